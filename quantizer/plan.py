"""Recipe x model -> what will happen to each layer, and why; all that can be wrong is found here."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from dataclasses import replace as but
from typing import Any

import torch
from pydantic import ValidationError
from rich.table import Table
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..layers import SCHEMES, QuantLinear, Scheme, storage_bytes
from ..recipes import Recipe, SchemeSpec, pattern_matches, suggest
from . import tables
from .errors import PlanError
from .linears import is_linear, shape_of
from .surgery import Site, find_sites

UNTIED = "untied"
FREED = "untied, as all other owners of its weight are"


@dataclass(frozen=True)
class PlannedLayer:
    """One linear layer: its fate, and the bytes that it costs.

    names: every path to it (shared modules have several). scheme is None where the layer stays as it is, and
    reason says why. bytes_before leaves out the weight of a layer to be untied if another owner keeps it.
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

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        """The name, for messages; the root has none."""
        return self.name or "(the model)"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the float weight."""
        return self.in_features * self.out_features * self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight costs afterwards; scales, branch and bias are in it."""
        weights = self.in_features * self.out_features
        return 8 * self.bytes_after / weights if weights else 0.0


Resolved = tuple[type[QuantLinear], Scheme]


@dataclass(frozen=True)
class Uncovered:
    """Parameters of two or more dimensions that are no linear layer's, so that no rule can reach them."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    numel: int
    is_fused_experts: bool = False


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
        return self.bytes_before + sum(layer.bytes_after - layer.bytes_before for layer in self.todo)

    @property
    def coverage(self) -> float:
        """Share of the model's weights that are, or will be, in quantized layers."""
        done = sum(x.in_features * x.out_features for x in self.layers if x.scheme is not None)
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
    schemes, problems = _resolve_all(recipe)
    problems += _unmatched(recipe, sites, model)
    layers = []
    for site in sites:
        try:
            layers.append(_plan_site(site, recipe, schemes))
        except PlanError as error:
            problems.append(str(error))
    if problems:
        raise PlanError("\n".join(dict.fromkeys(problems)))
    layers = _count_freed(sites, layers)
    # An untied layer becomes a weight of its own, beside the one that the other owner keeps.
    added = sum(x.in_features * x.out_features for x in layers if x.already or x.reason == UNTIED)
    factors = {id(p) for s in sites if isinstance(s.module, QuantLinear) for p in _own_weights(s.module)}
    total = sum(p.numel() for p in _distinct(p for p in model.parameters() if id(p) not in factors)) + added
    uncovered = _uncovered(model, {id(s.module) for s, x in zip(sites, layers, strict=True) if x.reason == UNTIED})
    return Plan(
        recipe=recipe,
        layers=tuple(layers),
        uncovered=uncovered,
        bytes_before=sum(map(_bytes, _distinct((*model.parameters(), *model.buffers())))),
        total_weights=total,
        notes=_notes(layers, uncovered, total),
    )


def _plan_site(site: Site, recipe: Recipe, schemes: dict[tuple, Resolved]) -> PlannedLayer:
    linear = site.module
    n, k = shape_of(linear)
    if isinstance(linear, QuantLinear):
        size = storage_bytes(linear)
        reason = f"already quantized ({linear.scheme_name})"
        return PlannedLayer(
            site.names, type(linear).__name__, k, n, linear.dtype, linear.scheme_name, linear.scheme, reason,
            size, size, already=True,
        )  # fmt: skip
    # Not `.weight`: a parametrized one is computed at each access, and spectral_norm changes the model by it.
    own = [p for p in linear.parameters() if not is_lazy(p)]
    weight = linear._parameters.get("weight")
    dtype = next((p.dtype for p in (weight, *own) if p is not None), torch.get_default_dtype())
    size = sum(map(_bytes, own))

    def leave(reason: str) -> PlannedLayer:
        return PlannedLayer(site.names, type(linear).__name__, k, n, dtype, None, None, reason, size, size)

    index, rule = next(((i, r) for i, r in enumerate(recipe.rules) if _matches(r.match, site)), (None, None))
    if site.obstacle:
        return leave(site.obstacle)
    if rule is not None and rule.skip is not None:
        return leave(rule.skip)
    spec = rule.scheme if rule is not None else recipe.scheme
    if spec is None:
        return leave("no rule names it, and the recipe has no default scheme")
    if site.tied and not (rule is not None and rule.untie):
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
    after = storage_bytes(cls(k, n, linear.bias is not None, scheme=scheme, device="meta", dtype=dtype))
    before = _bytes(linear.bias) if site.tied and linear.bias is not None else 0 if site.tied else size
    return PlannedLayer(
        site.names,
        type(linear).__name__,
        k,
        n,
        dtype,
        cls.scheme_name,
        scheme,
        UNTIED if site.tied else "",
        before,
        after,
    )


def _resolve_all(recipe: Recipe) -> tuple[dict[tuple, Resolved], list[str]]:
    """Every scheme of the recipe by its path in it, and what is wrong with the others, used or not."""
    specs = [
        (("scheme",), recipe.scheme),
        *((("rules", i, "scheme"), r.scheme) for i, r in enumerate(recipe.rules)),
    ]
    schemes, problems = {}, []
    for path, spec in specs:
        if spec is None:
            continue
        try:
            schemes[path] = resolve_scheme(recipe, path, spec)
        except PlanError as error:
            problems.append(str(error))
    return schemes, problems


def resolve_scheme(recipe: Recipe, path: tuple, spec: SchemeSpec) -> Resolved:
    """The layer class and checked options that a recipe's scheme means; PlanError with file and line."""
    cls = SCHEMES.get(spec.name)
    if cls is None:
        near = suggest(spec.name, SCHEMES)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise PlanError(
            str(recipe.error((*path, "name"), f"no scheme '{spec.name}'{hint} (known: {', '.join(SCHEMES)})"))
        )
    try:
        return cls, cls.Scheme(**spec.options)
    except ValidationError as error:
        raise PlanError(
            "\n".join(str(recipe.error((*path, *e["loc"]), _in_words(e, cls))) for e in error.errors())
        ) from None


def _in_words(error: dict, cls: type[QuantLinear]) -> str:
    if error["type"] == "extra_forbidden":
        name, known = str(error["loc"][-1]), list(cls.Scheme.model_fields)
        near = suggest(name, known)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"scheme {cls.scheme_name} has no option '{name}'{hint} (options: {', '.join(known) or 'none'})"
    if error["type"] == "value_error":  # options that exclude each other: the Scheme's own words
        return str(error["ctx"]["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _matches(patterns: tuple[str, ...], site: Site) -> bool:
    kind = type(site.module).__name__
    # A layer that is quantized already still counts as what it may have been, so that a run can be continued.
    kinds = (kind, "Linear", "Conv1D") if isinstance(site.module, QuantLinear) else (kind,)
    return any(pattern_matches(p, name, c) for p in patterns for name in site.names for c in kinds)


def _unmatched(recipe: Recipe, sites: list[Site], model: nn.Module) -> list[str]:
    problems = []
    for i, rule in enumerate(recipe.rules):
        for j, pattern in enumerate(rule.match):
            if not rule.optional and not any(_matches((pattern,), site) for site in sites):
                problems.append(str(recipe.error(("rules", i, "match", j), _why_unmatched(pattern, sites, model))))
    return problems


def _why_unmatched(pattern: str, sites: list[Site], model: nn.Module) -> str:
    names = [name for site in sites for name in site.names]
    for other, module in model.named_modules(remove_duplicate=False):
        if other and pattern_matches(pattern, other, type(module).__name__):
            inside = any(name.startswith(f"{other}.") for name in names)
            hint = f"; for those inside it write '{other}.*'" if inside else ""
            return f"'{pattern}' matches '{other}', a {type(module).__name__}, but no linear layer{hint}"
    near = suggest(pattern, names)
    hint = f"the nearest names are {', '.join(map(repr, near))}" if near else "see the names with `qgraft plan`"
    return f"'{pattern}' matches no linear layer; {hint} (a rule with `optional: true` may match nothing)"


def _own_weights(layer: QuantLinear) -> list[nn.Parameter]:
    """Parameters in which a quantized layer keeps its weight, which is counted by its sizes."""
    return [p for name, p in layer.named_parameters() if name != "bias"]


def _count_freed(sites: list[Site], layers: list[PlannedLayer]) -> list[PlannedLayer]:
    """A tied weight goes away when all its owners are quantized; the first of them then counts its bytes."""
    todo = [x for x in layers if x.scheme is not None and not x.already]
    gone = {f"{name}.weight".lstrip(".") for x in todo for name in x.names}
    counted: set[str] = set()
    result = []
    for site, layer in zip(sites, layers, strict=True):
        if layer.reason == UNTIED and gone.issuperset(site.tied) and counted.isdisjoint(site.tied):
            counted.update(f"{name}.weight".lstrip(".") for name in layer.names)
            layer = but(layer, reason=FREED, bytes_before=layer.bytes_before + layer.weight_bytes)
        result.append(layer)
    return result


def _uncovered(model: nn.Module, untied: set[int]) -> tuple[Uncovered, ...]:
    """untied: ids of the linear layers whose weight stays behind with its other owner."""
    found, seen = [], set()
    for module in model.modules():
        if (is_linear(module) or isinstance(module, QuantLinear)) and id(module) not in untied:
            seen.update(id(p) for p in module.parameters(recurse=False))
    for name, module in model.named_modules():
        if id(module) in untied:
            continue
        for leaf, p in module.named_parameters(recurse=False):
            if is_lazy(p) or p.ndim < 2 or id(p) in seen:
                continue
            seen.add(id(p))
            path, shape = f"{name}.{leaf}".lstrip("."), tuple(p.shape)
            # (1, ...) is a position or class embedding.
            experts = p.ndim == 3 and shape[0] > 1 and not isinstance(module, _ConvNd)
            found.append(Uncovered(path, type(module).__name__, shape, _bytes(p), p.numel(), experts))
    return tuple(found)


def _notes(layers: list[PlannedLayer], uncovered: tuple[Uncovered, ...], total: int) -> tuple[str, ...]:
    notes = list(dict.fromkeys(x.scheme.note() for x in layers if x.scheme is not None and not x.already))
    notes = [note for note in notes if note]
    experts = [u for u in uncovered if u.is_fused_experts]
    if experts:
        share = 100 * sum(u.numel for u in experts) / total
        notes.append(
            f"{len(experts)} fused 3-D parameters ({_first(u.name for u in experts)}) hold {share:.1f} % of "
            "the weights and stay as they are: they are no linear layers, so no rule can reach them"
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


def _distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each memory once: two parameters can share it without being one object."""
    found = {}
    for t in tensors:
        if not is_lazy(t):
            found.setdefault(id(t) if t.is_meta else t.data_ptr() or id(t), t)
    return list(found.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
