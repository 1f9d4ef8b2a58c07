"""class Quantizer: read a recipe, look at the model, replace each layer that a rule means."""

import copy
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layers import QuantLinear, Stats, Unsuitable
from ..layers.algorithms.compensation import compensate
from ..recipes import Recipe, load_recipe
from . import calibration as calibrate
from .chain import find_chain
from .errors import CalibrationError, PlanError, QuantizeError, some
from .interop.clients import attach
from .kinds import as_linear, quantized
from .plan import Plan, PlannedLayer, make_plan
from .report import Report, measure
from .rules import ALL
from .sequential import Sequence
from .sharing import tied_head
from .surgery import find_sites, replace, split_experts

# Second moments of the layers calibrated in one pass over the data; more layers take more passes.
STATS_BYTES = 1 << 30


class Quantizer:
    """Quantizes the linear layers of a model, and the embeddings that a recipe names.

    model: any `nn.Module`, on CPU or GPU, in float32, bfloat16 or float16.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Quantizer takes an nn.Module, got {type(model).__name__}")
        self.model = model

    @property
    def report(self) -> Report:
        """Error, size and time of each layer quantized so far."""
        return Report.of(self.model)

    def plan(self, recipe: str | Path | Recipe) -> Plan:
        """What `quantize` would do, without touching anything; also works on a model on the meta device.

        recipe: a shipped name ("w4a4_svd"), the path of a YAML file, or a Recipe.
        Raises RecipeError or PlanError with every problem, with file and line.
        """
        return make_plan(self.model, load_recipe(recipe))

    def quantize(
        self,
        recipe: str | Path | Recipe,
        *,
        calibration: Any = None,
        tokenizer: Any = None,
        inplace: bool = True,
        progress: bool = True,
        details: bool = False,
    ) -> nn.Module:
        """Quantize as the recipe says, and return the model.

        calibration: a tensor or dict (one batch), a list of tensors, dicts or tuples, a DataLoader, a
        function that takes the model and runs it, or a list of texts together with `tokenizer`. Without it,
        schemes that want data work from the weights alone.
        inplace: False quantizes a copy (and needs the memory for it); `self.model` is then the copy.
        progress: bars for calibration and layers, shown on a terminal only.
        details: record histograms and singular values of each layer for the HTML report; a few kB a layer, and
        longer by a second for a large one.

        Memory: each float weight is released as its layer is replaced, so the peak stays under the model and
        one layer's working set, plus up to 1 GiB of statistics if there is calibration data, the activations of
        one block where calibration is sequential, and a copy of the experts of one fused module while they are
        split.
        Interrupted or failed, every layer is either the original or finished; calling again goes on from
        there. Raises RecipeError and PlanError before anything is touched, CalibrationError if the data does
        not run, and QuantizeError if a layer fails. A layer that its options make no smaller stays as it is,
        with a warning.
        """
        plan = self.plan(recipe)
        _check_weights(self.model, plan)
        if not inplace:
            self.model = copy.deepcopy(self.model)
        if not plan.todo:
            why = some([f"'{layer.label}': {layer.reason}" for layer in plan.layers], "\n", 3)
            warnings.warn(f"recipe {plan.recipe.name}: no layer is left to quantize\n{why}".rstrip(), stacklevel=2)
        run = None
        if calibration is not None:
            run = calibrate.make_runner(calibration, plan.recipe.calibration, tokenizer, progress)
        _check_data(plan, run)
        self.model = split_experts(self.model, (planned.name for planned in plan.todo))
        done, left = 0, []
        heads: dict[str, list[PlannedLayer]] = {}
        for planned in plan.todo:
            heads.setdefault(planned.codes_of, []).append(planned)
        todo = tuple(heads.pop("", ()))  # a head that shares an embedding's codes is quantized together with it
        with tqdm(total=len(todo), desc="quantize", disable=None if progress else True) as bar:
            for wave, stats in self._stages(todo, run, plan.recipe.calibration.sequential):
                for planned in wave:
                    bar.set_postfix_str(planned.name, refresh=True)
                    try:
                        self._graft(planned, stats.get(planned.name), heads.get(planned.name, []), details)
                    except Unsuitable as reason:
                        left.append(f"'{planned.label}': {reason}")
                    except (Exception, KeyboardInterrupt) as error:
                        attach(self.model)
                        raise _explain(error, planned, done, len(todo)) from error
                    stats.pop(planned.name, None)
                    done += 1
                    bar.update()
        attach(self.model)
        if left:
            warnings.warn("these layers stay as they are:\n" + some(left, "\n", show=10), stacklevel=2)
        return self.model

    def _stages(
        self, todo: tuple[PlannedLayer, ...], run: calibrate.Runner | None, sequential: bool
    ) -> Iterator[tuple[list[PlannedLayer], dict[str, Stats]]]:
        """Layers that are quantized together, and the statistics of their inputs."""
        chain = None
        by_name = {planned.name: planned for planned in todo}
        # An embedding gets ids, no activations.
        needs = {p.name: ALL[p.scheme_name].needs for p in todo if issubclass(ALL[p.scheme_name], QuantLinear)}
        # What only wants to know largest values or ranges gains nothing that pays for the passes.
        if run is not None and sequential and any("second_moment" in needed for needed in needs.values()):
            chain = find_chain(self.model, {name for name, needed in needs.items() if needed}, run)
        inside: set[str] = set()
        if chain is not None:  # whose float activations it has kept, before anything is quantized
            sequence = Sequence(chain, lambda: self.model, needs, run)
            inside = sequence.layers
        for wave in _waves(tuple(p for p in todo if p.name not in inside), calibrated=run is not None):
            yield wave, self._collect(wave, run)
        if chain is not None:
            for names, stats in sequence.stages(changed=len(inside) < len(todo)):
                wave = [by_name[name] for name in names]
                self._check_reached(wave, stats)
                yield wave, stats

    def _collect(self, wave: list[PlannedLayer], run: calibrate.Runner | None) -> dict[str, Stats]:
        wave = [p for p in wave if issubclass(ALL[p.scheme_name], QuantLinear)]
        if run is None or not wave:
            return {}
        wanted = {p.name: ALL[p.scheme_name].needs for p in wave}
        stats = calibrate.collect(self.model, {n: self.model.get_submodule(n) for n in wanted}, wanted, run)
        self._check_reached(wave, stats)
        return stats

    def _check_reached(self, wave: list[PlannedLayer], stats: dict[str, Stats]) -> None:
        missed = [planned for planned in wave if planned.name not in stats]
        for planned in missed:
            if complaint := planned.scheme.needs_data():
                raise CalibrationError(
                    f"layer '{planned.label}': the calibration data does not reach it, and {complaint}"
                )
        if missed:
            names = ", ".join(p.label for p in missed[:3]) + (", ..." if len(missed) > 3 else "")
            warnings.warn(
                f"the calibration data did not reach {names} ({len(missed)} in all): quantized from the weights alone",
                stacklevel=3,
            )

    def _graft(
        self, planned: PlannedLayer, stats: Stats | None, heads: list[PlannedLayer], details: bool = False
    ) -> None:
        """heads: what is tied to this embedding, and shares its codes."""
        start = time.perf_counter()
        module = _compensated(
            self.model.get_submodule(planned.name), stats, ALL[planned.scheme_name].compensation_damping
        )
        layer = quantized(module, ALL[planned.scheme_name], planned.scheme, stats)
        seconds = time.perf_counter() - start
        layer.report = measure(planned.name, as_linear(module), layer, stats, planned.bytes_before, seconds, details)
        if not math.isfinite(layer.report.weight_error):
            raise ArithmeticError("the quantized weight is not finite")
        swaps = [
            (planned.names, layer),
            *((h.names, tied_head(self.model.get_submodule(h.name), h, layer)) for h in heads),
        ]
        self.model = replace(self.model, *swaps)


def _compensated(module: nn.Module, stats: Stats | None, damping: float) -> nn.Module:
    """The module, or a linear layer in its place that makes up for what the layers before it lost."""
    if stats is None or stats.cross_moment is None:
        return module
    linear = as_linear(module)
    weight = compensate(linear.weight.detach(), stats.second_moment, stats.cross_moment, damping)
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    other.bias = linear.bias
    return other.train(module.training)


def _waves(todo: tuple[PlannedLayer, ...], calibrated: bool) -> Iterator[list[PlannedLayer]]:
    """Layers whose statistics are collected in one pass over the data, bounded in memory."""
    wave: list[PlannedLayer] = []
    used = 0
    for planned in todo:
        moment = "second_moment" in ALL[planned.scheme_name].needs
        cost = 4 * planned.in_features**2 if calibrated and moment else 0
        if wave and used + cost > STATS_BYTES:
            yield wave
            wave, used = [], 0
        wave.append(planned)
        used += cost
    if wave:
        yield wave


def _check_weights(model: nn.Module, plan: Plan) -> None:
    problems = []
    modules = {site.name: site.module for site in find_sites(model)}
    for planned in plan.todo:
        weight = modules[planned.name].weight.detach()
        if weight.is_meta:
            problems.append(f"layer '{planned.label}' is on the meta device: load the model's weights first")
        elif not torch.isfinite(weight).all():
            problems.append(f"layer '{planned.label}' has NaN or infinite weights")
    if problems:
        raise PlanError(some(problems, "\n", show=10))


def _check_data(plan: Plan, run: calibrate.Runner | None) -> None:
    """Options that cannot do without calibration data are found before the first layer, not at it."""
    if run is not None:
        return
    for planned in plan.todo:
        complaint = planned.scheme.needs_data()
        if complaint:
            raise CalibrationError(f"layer '{planned.label}': {complaint}")


def _explain(error: BaseException, planned: PlannedLayer, done: int, total: int) -> BaseException:
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    shape = f"{planned.out_features} x {planned.in_features}"
    progress = f"{done} of {total} layers are done"
    message = (
        f"layer '{planned.label}' ({planned.scheme_name}, {shape}): {what}. {progress}, "
        "this one and the others are as they were; call quantize() again to go on."
    )
    return KeyboardInterrupt(message) if isinstance(error, KeyboardInterrupt) else QuantizeError(message)
