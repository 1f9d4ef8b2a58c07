"""A model on meta, a few layers at a time: which belong together, and how they are quantized and described.

A unit is what has to be read at once: a layer; an embedding with the heads that share its codes; all experts that lie
in one fused module.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ..layers import Experts, QuantEmbedding, QuantLayer, Unsuitable
from .checkpoint import join
from .errors import QuantizeError
from .float_files import FloatFiles
from .graft import with_heads
from .kinds import as_linear, empty, quantized, shape_of
from .partial import Row
from .plan import Plan, PlannedLayer
from .report import LayerReport, measure
from .rules import ALL
from .sharing import tied_head
from .surgery import find_sites, replace, split_experts

# What a rank costs beside the passes over the weight that every scheme makes: measured, in passes for each 32.
RANK_COST = 1 / 32


@dataclass
class Unit:
    """home: the module that holds the weights, as the float model has it, and `leaves` its parameters.

    layers: those to quantize, by name, without heads; of a fused module, some or all of its experts' projections.
    """

    home: str
    leaves: tuple[str, ...]
    fused: bool
    layers: dict[str, PlannedLayer] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """Of quantizing it, up to a factor."""
        return sum(x.weights * (1 + RANK_COST * (getattr(x.scheme, "rank", 0) or 0)) for x in self.layers.values())


def make_units(model: nn.Module, plan: Plan) -> list[Unit]:
    """All that a plan will quantize, in the model's order."""
    sites = {site.name: site for site in find_sites(model)}
    units: dict[str, Unit] = {}
    for planned in plan.todo:
        if planned.codes_of:
            continue
        site = sites[planned.name]
        fused = site.fused is not None
        holder = site.fused if fused else site.module
        home = planned.name.rpartition(".")[0].rpartition(".")[0] if fused else planned.name
        leaves = tuple(name for name, p in holder._parameters.items() if p is not None)
        units.setdefault(home, Unit(home, leaves, fused)).layers[planned.name] = planned
    return list(units.values())


@torch.no_grad()
def quantize_unit(
    model: nn.Module, files: FloatFiles, unit: Unit, device: torch.device | None, details: bool = False
) -> tuple[dict[str, Tensor], list[Row]]:
    """The tensors of the quantized unit, by their names in the quantized model, and what became of each layer.

    Where a fused module is split, all its experts are in it, those that stay in float too.
    Raises QuantizeError, with the name of the layer.
    """
    tensors = files.read(join(unit.home, leaf) for leaf in unit.leaves)
    result: dict[str, Tensor] = {}
    rows = []
    for name, module in float_modules(model, unit, tensors):
        planned = unit.layers.get(name)
        row, made = Row(name), module
        if planned is not None:
            try:
                row, made = _quantize(planned, module if device is None else module.to(device), details)
            except Unsuitable as reason:
                row = Row(name, left=str(reason))
            except Exception as error:
                raise failed(planned, error) from error
            rows.append(row)
        if unit.fused or (planned is not None and not row.left):
            result.update({join(name, key): t.cpu().contiguous() for key, t in made.state_dict().items()})
    return result, rows


def failed(planned: PlannedLayer, error: Exception) -> QuantizeError:
    """What to raise for a layer whose quantization raised `error`, when finished layers are in files."""
    shape = f"{planned.out_features} x {planned.in_features}"
    return QuantizeError(
        f"layer '{planned.label}' ({planned.scheme_name}, {shape}): {type(error).__name__}: {error}. "
        "What was done before is kept: when that is mended, the same command goes on from there."
    )


def float_modules(model: nn.Module, unit: Unit, tensors: dict[str, Tensor]) -> Iterator[tuple[str, nn.Module]]:
    """The float layers of the unit with their weights, one after another."""
    module = _filled(model.get_submodule(unit.home), {leaf: tensors[join(unit.home, leaf)] for leaf in unit.leaves})
    if not unit.fused:
        yield unit.home, module
        return
    for leaf, linear in Experts(module, copy=False).projections():
        # A copy each, in one order of memory, as if the module had been split before: sums round the same.
        for name, p in linear.named_parameters():
            linear._parameters[name] = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format), False)
        yield join(unit.home, leaf), linear
        linear._parameters.clear()


def _filled(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The same module with other parameters; the one given is not changed."""
    new = copy.copy(module)
    new.__dict__["_parameters"] = dict(module._parameters)
    for leaf, tensor in tensors.items():
        new._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return new


def _quantize(planned: PlannedLayer, module: nn.Module, details: bool) -> tuple[Row, QuantLayer]:
    start = time.perf_counter()
    layer = quantized(module, ALL[planned.scheme_name], planned.scheme)
    seconds = time.perf_counter() - start
    report = measure(planned.name, as_linear(module), layer, None, planned.bytes_before, seconds, details)
    if not math.isfinite(report.weight_error):
        raise ArithmeticError("the quantized weight is not finite")
    layer.report = report
    return row_of(planned, layer), layer


def row_of(planned: PlannedLayer, layer: QuantLayer) -> Row:
    """What became of a layer that is quantized."""
    return Row(planned.name, planned.scheme_name, layer.scheme.model_dump(), asdict(layer.report))


def graft_empty(model: nn.Module, plan: Plan, rows: dict[str, Row]) -> nn.Module:
    """The quantized model on meta, from the float one: its layers have their schemes and reports, and no values."""
    model = split_experts(model, (planned.name for planned in plan.todo))
    heads = with_heads(plan.todo)
    for planned in heads.pop(""):
        if not rows[planned.name].left:
            model = graft_known(model, planned, rows[planned.name], heads.get(planned.name, []))
    return model


def graft_known(
    model: nn.Module,
    planned: PlannedLayer,
    row: Row,
    heads: list[PlannedLayer],
    tensors: dict[str, Tensor] | None = None,
) -> nn.Module:
    """The model, in which a layer that was quantized before stands where the float one was.

    heads: what is tied to this embedding. tensors: the layer's state; None leaves it on meta.
    """
    layer = _empty(model, planned, row.options)
    if tensors is not None:
        layer.load_state_dict(tensors, assign=True)
    layer.report = LayerReport(**row.report)
    tied = ((head.names, tied_head(model.get_submodule(head.name), head, layer)) for head in heads)
    return replace(model, (planned.names, layer), *tied)


def _empty(model: nn.Module, planned: PlannedLayer, options: dict) -> QuantLayer:
    module, cls = model.get_submodule(planned.name), ALL[planned.scheme_name]
    layer = empty(cls, shape_of(module), cls.Scheme(**options), planned.dtype)
    if isinstance(layer, QuantEmbedding):
        layer.padding_idx = module.padding_idx
    else:
        layer.bias = module.bias
    return layer
