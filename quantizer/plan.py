"""Recipe x model -> what will happen to each layer, and why; all that can be wrong is found here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from dataclasses import replace as but
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from ..layers import QuantLayer, Scheme, storage_bytes
from ..recipes import Recipe
from . import tables
from .errors import PlanError
from .kinds import empty, shape_of
from .rules import Resolved, resolve_all, rule_for, unmatched
from .sharing import shared_codes
from .surgery import Site, find_sites, own_names
from .uncovered import Uncovered, bytes_of, distinct, find_uncovered

UNTIED = "untied"
FREED = "untied, as all other owners of its weight are"


@dataclass(frozen=True)
class PlannedLayer:
    """One linear layer, or an embedding that a rule names: its fate, and the bytes that it costs.

    names: every path to it (shared modules have several). scheme is None where the layer stays as it is, and
    reason says why. bytes_before leaves out the weight of a layer to be untied if another owner keeps it.
    in_features, out_features: of an embedding, its columns and rows. codes_of: the embedding whose codes a tied
    head shares, and which counts their bytes.
    """

    names: tuple[str, ...]
    kind: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    scheme_name: str | None
    scheme: Scheme | None
    reason: str
    bytes_before: int
    bytes_after: int
    already: bool = False
    codes_of: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        """The name, for messages; the root has none."""
        return self.name or "(the model)"

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.in_features * self.out_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of the float weight."""
        return self.weights * self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight costs afterwards; scales, branch and bias are in it."""
        return 8 * self.bytes_after / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Plan:
    """What `quantize` will do. `print(plan)` shows it; `layers` has every layer."""

    recipe: Recipe
    layers: tuple[PlannedLayer, ...]
    uncovered: tuple[Uncovered, ...]
    bytes_before: int
    total_weights: int
    notes: tuple[str, ...] = field(default=())

    @property
    def todo(self) -> tuple[PlannedLayer, ...]:
        """The layers that will be quantized."""
        return tuple(layer for layer in self.layers if layer.scheme is not None and not layer.already)

    @property
    def bytes_after(self) -> int:
        """Of the whole model, to the byte."""
        return self.bytes_before + sum(layer.bytes_after - layer.bytes_before for layer in self.todo)

    @property
    def coverage(self) -> float:
        """Share of the model's weights that are, or will be, in quantized layers."""
        done = sum(x.weights for x in self.layers if x.scheme is not None and not x.codes_of)
        return done / self.total_weights if self.total_weights else 0.0

    def table(self, every: bool = False) -> Table:
        """A rich table; layers that differ only in their numbers stand in one line unless `every`."""
        return tables.plan_table(self, every)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "coverage": self.coverage,
            "layers": [
                {
                    "names": list(x.names),
                    "shape": [x.out_features, x.in_features],
                    "scheme": x.scheme and {"name": x.scheme_name, **x.scheme.model_dump()},
                    "reason": x.reason,
                    "codes_of": x.codes_of or None,
                    "bits_per_weight": x.bits_per_weight,
                    "bytes_before": x.bytes_before,
                    "bytes_after": x.bytes_after,
                }
                for x in self.layers
            ],
            "uncovered": [{"name": u.name, "kind": u.kind, "shape": list(u.shape)} for u in self.uncovered],
        }

    def __str__(self) -> str:
        return tables.to_text(self.table())


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Resolve the recipe against the model, also on meta. Raises PlanError with every problem."""
    sites = find_sites(model)
    schemes, problems = resolve_all(recipe)
    problems += unmatched(recipe, sites, model)
    owners = {}
    if not problems:
        owners, problems = shared_codes(sites, recipe, schemes)
    planned = []
    for site in sites:
        try:
            layer = _plan_site(site, recipe, schemes, owners)
            if layer is not None:
                planned.append((site, layer))
        except PlanError as error:
            problems.append(str(error))
    if problems:
        raise PlanError("\n".join(dict.fromkeys(problems)))
    sites, layers = [site for site, _ in planned], _count_freed(planned)
    # An untied layer becomes a weight of its own, beside the one that the other owner keeps.
    added = sum(x.weights for x in layers if (x.already and not x.codes_of) or x.reason == UNTIED)
    factors = {id(p) for s in sites if isinstance(s.module, QuantLayer) for p in _own_weights(s.module)}
    total = sum(p.numel() for p in distinct(p for p in model.parameters() if id(p) not in factors)) + added
    covered = [s.fused or s.module for s, x in zip(sites, layers, strict=True) if x.reason != UNTIED]
    untied = [s.module for s, x in zip(sites, layers, strict=True) if x.reason == UNTIED]
    uncovered = find_uncovered(model, covered, untied)
    return Plan(
        recipe=recipe,
        layers=tuple(layers),
        uncovered=uncovered,
        bytes_before=sum(map(bytes_of, distinct((*model.parameters(), *model.buffers())))),
        total_weights=total,
        notes=_notes(layers, uncovered, total),
    )


def _plan_site(
    site: Site, recipe: Recipe, schemes: dict[tuple, Resolved], owners: dict[str, str]
) -> PlannedLayer | None:
    """None for an embedding that no rule means. owners: see shared_codes()."""
    module, kind = site.module, type(site.module).__name__
    n, k = shape_of(module)
    if isinstance(module, QuantLayer):
        owner = owners.get(site.name, "")
        size = _bias_bytes(module) if owner else storage_bytes(module)
        reason = f"already quantized ({module.scheme_name})"
        return PlannedLayer(
            site.names, kind, k, n, module.dtype, module.scheme_name, module.scheme, reason, size, size,
            already=True, codes_of=owner,
        )  # fmt: skip
    # Not `.weight`: a parametrized one is computed at each access, and spectral_norm changes the model by it.
    own = [p for p in module.parameters() if not is_lazy(p)]
    weight = module._parameters.get("weight")
    dtype = next((p.dtype for p in (weight, *own) if p is not None), torch.get_default_dtype())
    size = sum(map(bytes_of, own))

    def leave(reason: str) -> PlannedLayer:
        return PlannedLayer(site.names, kind, k, n, dtype, None, None, reason, size, size)

    index, rule = rule_for(site, recipe)
    if site.is_embedding and rule is None:
        return None
    if site.obstacle:
        return leave(site.obstacle)
    if rule is not None and rule.skip is not None:
        return leave(rule.skip)
    spec = rule.scheme if rule is not None else recipe.scheme
    if spec is None:
        return leave("no rule names it, and the recipe has no default scheme")
    owner = owners.get(site.name, "")
    untie = site.tied and rule is not None and rule.untie and not owner
    if site.tied and not untie and not owner:
        return leave(f"its weight is tied to {site.tied[0]}; a rule with `untie: true` would quantize a copy")
    if min(n, k) < recipe.min_features:
        return leave(f"smaller than min_features = {recipe.min_features}")
    path = ("scheme",) if index is None else ("rules", index, "scheme")
    if path not in schemes:
        return leave("its scheme is wrong")  # which is among the problems already
    cls, scheme = schemes[path]
    try:
        scheme.check_shape(k, n)
    except ValueError as error:
        if index is None:  # a default is not meant for each and every layer; a rule names what it means
            return leave(str(error))
        raise PlanError(str(recipe.error(path, f"layer '{site.label}': {error}"))) from None
    layer = empty(cls, (n, k), scheme, dtype, getattr(module, "bias", None) is not None)
    if reason := own_names(module, layer):
        return leave(reason)
    before, after = size, storage_bytes(layer)
    if untie:
        before = _bias_bytes(module)
    elif owner and owner != site.name:
        before = after = _bias_bytes(module)
    return PlannedLayer(
        site.names, kind, k, n, dtype, cls.scheme_name, scheme, UNTIED if untie else "", before, after,
        codes_of=owner if owner != site.name else "",
    )  # fmt: skip


def _bias_bytes(module: nn.Module) -> int:
    bias = getattr(module, "bias", None)
    return 0 if bias is None else bytes_of(bias)


def _own_weights(layer: QuantLayer) -> list[nn.Parameter]:
    """Parameters in which a quantized layer keeps its weight, which is counted by its sizes."""
    return [p for name, p in layer.named_parameters() if name != "bias"]


def _count_freed(planned: list[tuple[Site, PlannedLayer]]) -> list[PlannedLayer]:
    """A tied weight goes away when all its owners are quantized; the first of them then counts its bytes."""
    todo = [x for _, x in planned if x.scheme is not None and not x.already]
    gone = {f"{name}.weight".lstrip(".") for x in todo for name in x.names}
    counted: set[str] = set()
    result = []
    for site, layer in planned:
        if layer.reason == UNTIED and gone.issuperset(site.tied) and counted.isdisjoint(site.tied):
            counted.update(f"{name}.weight".lstrip(".") for name in layer.names)
            layer = but(layer, reason=FREED, bytes_before=layer.bytes_before + layer.weight_bytes)
        result.append(layer)
    return result


def _notes(layers: list[PlannedLayer], uncovered: tuple[Uncovered, ...], total: int) -> tuple[str, ...]:
    notes = list(dict.fromkeys(x.scheme.note() for x in layers if x.scheme is not None and not x.already))
    notes = [note for note in notes if note]
    experts = [u for u in uncovered if u.is_fused_experts]
    if experts:
        share = 100 * sum(u.numel for u in experts) / total
        notes.append(
            f"{len(experts)} fused 3-D parameters ({_first(u.name for u in experts)}) hold {share:.1f} % of "
            f"the weights and stay as they are: {'; '.join(dict.fromkeys(u.reason for u in experts))}"
        )
    untied = [x for x in layers if x.reason in (UNTIED, FREED)]
    grown = sum(x.bytes_after - x.bytes_before for x in untied)
    if grown > 0:
        notes.append(f"untying makes the model {tables.size(grown)} larger: the other owner keeps its weight")
    larger = [x for x in layers if x.bytes_after > x.bytes_before and x not in untied]
    if larger:
        notes.append(
            f"larger afterwards, {len(larger)} in all: {_first(x.label for x in larger)}; too small for what "
            "the scheme adds: a skip rule or a higher min_features leaves them alone"
        )
    if not layers:
        notes.append("the model has no linear layer: there is nothing to quantize")
    return tuple(notes)


def _first(names: Iterable[str]) -> str:
    head, *rest = names
    return f"{head}, ..." if rest else head
