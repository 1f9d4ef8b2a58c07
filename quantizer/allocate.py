"""qgraft.allocate: which scheme each layer gets, so that a budget of bits or bytes is used best."""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

from ..layers import QuantLinear, Unsuitable, storage_bytes
from ..recipes import CalibrationSpec, Recipe, SchemeSpec, load_recipe
from . import calibration as calibrate
from . import tables
from .allocation import Allocation, Choice, Point
from .budget import Budget, BudgetError, Option, parse, solve
from .errors import PlanError, some
from .kinds import quantized
from .plan import Plan, PlannedLayer, make_plan
from .rules import ALL
from .sensitivity import Probed, probe, weight_error
from .surgery import split_experts

CURVE = 12  # budgets that the curve is drawn over
STATS_BYTES = 1 << 30  # of second moments held at once


def allocate(
    model: nn.Module,
    budget: str,
    candidates: Sequence[str | Path | Recipe],
    *,
    calibration: Any,
    tokenizer: Any = None,
    ranks: Iterable[int] = (),
    group: Literal["fused", "none"] = "fused",
    progress: bool = True,
) -> Allocation:
    """Choose one of the candidates for each layer, so that the model loses least under a budget.

    model: a float model; it stays as it is, except that fused experts are split into linear layers.
    budget: "4.6 bits" of a weight, on average over the layers that at least one candidate quantizes, with scales,
    branches and biases; or "2.1 GiB" (B, KB, MB, GB, KiB, MiB, TiB) of the whole model.
    candidates: recipes; a layer that one of them leaves alone may stay in float at the price of its float bytes.
    calibration, tokenizer: as for `Quantizer.quantize`; whole sequences with all their logits.
    ranks: each candidate whose scheme has a branch is tried with each of these ranks, too.
    group: "fused" gives layers that read the same input in the same module (q, k and v; gate and up) the same
    candidate, as servers that fuse them need it; "none" lets them differ.

    Each layer is quantized once by every candidate, and what its error does to the model's output is predicted to
    first order (sensitivity.py); an exact solver chooses (budget.py).
    Raises RecipeError, PlanError and BudgetError, which names the least possible, before the measurement, and
    CalibrationError if the data does not run. Needs SciPy: pip install 'qgraft[allocate]'.
    """
    check_solver()
    if group not in ("fused", "none"):
        raise ValueError(f"group is 'fused' or 'none', not {group!r}")
    limit = parse(budget)
    recipes = _variants([load_recipe(c) for c in candidates], tuple(ranks))
    plans = {recipe.name: make_plan(model, recipe) for recipe in recipes}
    table = _Table(plans)
    table.check(limit)
    spec = max((r.calibration for r in recipes), key=lambda spec: spec.samples)
    run = calibrate.make_runner(calibration, spec, tokenizer, progress)
    model = split_experts(model, table.layers)
    modules = {name: model.get_submodule(name) for name in table.layers}
    probed = probe(model, modules, run)
    measured = _measure(model, modules, table, probed, run, progress)
    groups = probed.siblings if group == "fused" else [[name] for name in modules]
    return _choose(table, measured, groups, limit, probed.metric, spec)


class _Table:
    """Layers by candidates: what the plans say each costs."""

    def __init__(self, plans: dict[str, Plan]):
        self.plans = plans
        planned = {name: {layer.name: layer for layer in plan.layers} for name, plan in plans.items()}
        self.layers: dict[str, dict[str, PlannedLayer]] = {}  # layer -> candidate -> its fate
        for plan in plans.values():
            for layer in plan.todo:
                if not issubclass(ALL[layer.scheme_name], QuantLinear) or layer.codes_of or layer.reason:
                    raise PlanError(
                        f"recipe {plan.recipe.name}, layer '{layer.label}': allocate() chooses among linear layers "
                        "that own their weight; leave embeddings and tied weights to a recipe that extends what it "
                        "writes"
                    )
                self.layers.setdefault(layer.name, {name: planned[name][layer.name] for name in plans})
        if not self.layers:
            already = any(layer.already for plan in plans.values() for layer in plan.layers)
            why = ": its layers are quantized already, give the float model" if already else ""
            raise PlanError(f"none of the candidates ({', '.join(plans)}) quantizes a layer of this model{why}")
        first = next(iter(plans.values()))
        order = [layer.name for layer in first.layers if layer.name in self.layers]
        self.layers = {name: self.layers[name] for name in order}
        self.weights = sum(next(iter(fates.values())).weights for fates in self.layers.values())
        # What the layers do not change: the rest of the model.
        self.rest = first.bytes_before - sum(fates[first.recipe.name].bytes_before for fates in self.layers.values())

    def limit(self, budget: Budget) -> int:
        """In bytes of the layers."""
        if budget.bits is not None:
            return int(budget.bits * self.weights / 8)
        return budget.bytes - self.rest

    def check(self, budget: Budget) -> None:
        least = sum(min(fate.bytes_after for fate in fates.values()) for fates in self.layers.values())
        self.refuse_below(least, budget)

    def refuse_below(self, least: int, budget: Budget) -> None:
        """BudgetError if the least possible bytes of the layers are more than the budget has."""
        if least > self.limit(budget):
            possible = f"{8 * least / self.weights:.3f} bits" if budget.bits else tables.size(least + self.rest)
            exact = "" if budget.bits else f" ({least + self.rest} bytes)"
            raise BudgetError(
                f"a budget of {budget} cannot be met: with these candidates the least possible is {possible}{exact}. "
                "Give more, or a smaller candidate, such as w4a16 or a lower rank"
            )


def _variants(recipes: list[Recipe], ranks: tuple[int, ...]) -> list[Recipe]:
    """The candidates, and those of them that have a rank with each of `ranks`. PlanError on a name given twice."""
    found = []
    for recipe in recipes:
        found.append(recipe)
        scheme = recipe.scheme
        if scheme is None or scheme.name not in ALL or "rank" not in ALL[scheme.name].Scheme.model_fields:
            continue
        has = ALL[scheme.name].make_scheme(**scheme.options).rank
        for rank in dict.fromkeys(ranks):
            if rank != has:
                data = {**recipe.to_dict(), "name": f"{recipe.name} rank {rank}"}
                data["scheme"] = {"name": scheme.name, **scheme.options, "rank": rank}
                found.append(Recipe.from_dict(data))
    if not found:
        raise PlanError("give at least one candidate")
    twice = [name for name, count in Counter(recipe.name for recipe in found).items() if count > 1]
    if twice:
        raise PlanError(f"candidates are told apart by their names, and {', '.join(twice)} is there more than once")
    return found


def _measure(
    model: nn.Module, modules: dict[str, nn.Module], table: _Table, probed: Probed, run: Any, progress: bool
) -> dict[str, dict[str, Option]]:
    """Layer -> candidate -> its bytes and predicted error; a candidate that does not suit a layer is not there."""
    options: dict[str, dict[str, Option]] = {}
    by_weight: dict[str, dict[str, float]] = {}
    with tqdm(total=len(modules), desc="measure", disable=None if progress else True) as bar:
        for wave in _waves(modules, table):
            needs = {
                name: frozenset().union(*(ALL[f.scheme_name].needs for f in table.layers[name].values() if f.scheme))
                for name in wave
            }
            stats = calibrate.collect(model, {name: modules[name] for name in wave}, needs, run)
            for name in wave:
                bar.set_postfix_str(name)
                options[name], by_weight[name] = {}, {}
                for candidate, fate in table.layers[name].items():
                    if fate.scheme is None:
                        options[name][candidate] = Option(fate.bytes_after, 0.0)
                        continue
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # how much is lost is what is measured here
                            layer = quantized(modules[name], ALL[fate.scheme_name], fate.scheme, stats.get(name))
                    except Unsuitable:
                        continue
                    by_weight[name][candidate] = weight_error(modules[name], layer)
                    found = probed.probes.get(name)
                    error = by_weight[name][candidate] if found is None else found.cost(modules[name], layer)
                    options[name][candidate] = Option(storage_bytes(layer), error)
                stats.pop(name, None)
                bar.update()
    missed = [name for name in modules if name not in probed.probes]
    if missed:
        warnings.warn(
            f"the calibration data did not reach {some(missed, show=3)}, or the model's first output does not "
            "depend on them: judged by the error of the weight, with the mean sensitivity of the other layers",
            stacklevel=3,
        )
        pairs = [(options[n][c].error, error) for n in probed.probes for c, error in by_weight[n].items()]
        mean = sum(e for e, _ in pairs) / max(sum(w for _, w in pairs), 1e-30)
        for name in missed:
            options[name] = {c: Option(o.bytes, mean * o.error) for c, o in options[name].items()}
    return options


def _waves(modules: dict[str, nn.Module], table: _Table) -> Iterator[list[str]]:
    """Layers whose second moments are held at once."""
    wave: list[str] = []
    used = 0
    for name in modules:
        cost = 4 * next(iter(table.layers[name].values())).in_features ** 2
        if wave and used + cost > STATS_BYTES:
            yield wave
            wave, used = [], 0
        wave.append(name)
        used += cost
    yield wave


def _choose(
    table: _Table,
    measured: dict[str, dict[str, Option]],
    groups: list[list[str]],
    budget: Budget,
    metric: str,
    spec: CalibrationSpec,
) -> Allocation:
    names, options = [], []
    for group in groups:
        names.append([c for c in table.plans if all(c in measured[n] for n in group)])
        sums = [[measured[n][c] for n in group] for c in names[-1]]
        options.append([Option(sum(o.bytes for o in these), sum(o.error for o in these)) for these in sums])
        if not options[-1]:
            raise PlanError(f"no candidate suits {', '.join(group)}: add one, or let them differ (group: none)")
    least, most = (sum(best(o.bytes for o in group) for group in options) for best in (min, max))
    table.refuse_below(least, budget)

    def pick(limit: int) -> dict[str, str]:
        picks = solve(options, limit)
        return {n: names[g][i] for g, i in enumerate(picks) for n in groups[g]}

    def point(picked: dict[str, str]) -> Point:
        size = sum(measured[n][c].bytes for n, c in picked.items())
        error = sum(measured[n][c].error for n, c in picked.items())
        return Point(8 * size / table.weights, size + table.rest, error, dict(Counter(picked.values())))

    steps = [least + (most - least) * i // (CURVE - 1) for i in range(CURVE)]
    curve = {p.bytes: p for p in map(point, map(pick, steps))}
    chosen = pick(table.limit(budget))
    choices = tuple(
        Choice(n, chosen[n], measured[n][chosen[n]].bytes, fates[chosen[n]].weights, measured[n][chosen[n]].error)
        for n, fates in table.layers.items()
    )
    size = table.rest + sum(c.bytes for c in choices)
    return Allocation(_recipe(table, chosen, budget, spec), str(budget), metric, choices, tuple(curve.values()), size)


def _recipe(table: _Table, chosen: dict[str, str], budget: Budget, spec: CalibrationSpec) -> Recipe:
    """One rule for each candidate, which names its layers."""
    rules = []
    for candidate in dict.fromkeys(chosen.values()):
        by_scheme: dict[Any, list[str]] = defaultdict(list)
        for name in (n for n in chosen if chosen[n] == candidate):
            fate = table.layers[name][candidate]
            by_scheme[(fate.scheme_name, fate.scheme)].append(name)
        for (scheme_name, scheme), layers in by_scheme.items():
            match = [_pattern(table.layers[name][candidate]) for name in layers]
            if scheme is None:
                rules.append({"match": match, "skip": f"the budget is best used with these in float ({candidate})"})
            else:
                options = scheme.model_dump(exclude_unset=True)
                rules.append({"match": match, "scheme": SchemeSpec(name=scheme_name, options=options).to_plain()})
    return Recipe.from_dict(
        {
            "name": "allocated",
            "description": f"{budget}, chosen among {', '.join(table.plans)}.",
            "rules": rules,
            "calibration": spec.model_dump(),
            "min_features": 1,
        }
    )


def _pattern(layer: PlannedLayer) -> str:
    """One that means this layer and no other; the root has no name, but is the only one of its class."""
    if not layer.name:
        return layer.kind
    like_a_class = "." not in layer.name and layer.name[0].isupper()
    is_special = like_a_class or layer.name.startswith("re:") or set(layer.name) & set("*?[")
    return f"re:{re.escape(layer.name)}" if is_special else layer.name


def check_solver() -> None:
    """ImportError without the extra."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise ImportError("allocate() needs SciPy's solver: pip install 'qgraft[allocate]'") from None
