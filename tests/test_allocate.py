"""qgraft.allocate: the best choice under a budget, against trying them all; its predictions, against the truth."""

import itertools
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgraft
from qgraft import Quantizer, Recipe, allocate
from qgraft.layers import FactorizedLinear, W4A16Linear, W8A8Linear, W8A16Linear, storage_bytes
from qgraft.quantizer import CalibrationError, PlanError
from qgraft.quantizer.budget import BudgetError, Option, parse, solve
from qgraft.quantizer.sensitivity import KL, RELATIVE, probe

pytest.importorskip("scipy")
MODULE = sys.modules["qgraft.quantizer.allocate"]


class Block(nn.Module):
    """q, k and v read one tensor; gate reads another; odd sizes."""

    def __init__(self, width: int = 48, inner: int = 35):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(torch.sigmoid(self.q(h) * self.k(h)) * self.v(h))


@pytest.fixture
def model():
    return nn.Sequential(Block(), Block(), nn.Linear(48, 20))


@pytest.fixture
def data():
    return [torch.randn(3, 17, 48) for _ in range(4)]


def recipe(name: str, scheme: str, **options) -> Recipe:
    return Recipe.from_dict({"name": name, "scheme": {"name": scheme, **options}})


CANDIDATES = (
    recipe("four", "w4a16", rounding="rtn"),
    recipe("eight", "w8a16"),
    recipe("eights", "w8a8"),
)


def between(model: nn.Module, share: float) -> str:
    """A budget between all layers with four bits and all with eight."""
    plans = [Quantizer(model).plan(candidate) for candidate in CANDIDATES[:2]]
    low, high = (sum(x.bytes_after for x in plan.todo) for plan in plans)
    return f"{8 * (low + share * (high - low)) / sum(x.weights for x in plans[0].todo):.4f} bits"


# -- the solver --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 64, 10**6])
@pytest.mark.parametrize("spread", [0, 1, 9])
def test_no_assignment_is_better_than_the_solvers(unit, spread):
    for _ in range(6):
        groups = [
            [
                Option(unit * random.randint(1, 999), random.randint(0, 3) / 7 ** random.randint(0, spread))
                for _ in range(random.randint(1, 4))
            ]
            for _ in range(random.randint(1, 6))
        ]  # fmt: skip
        least, most = (sum(best(o.bytes for o in group) for group in groups) for best in (min, max))
        limit = random.randint(least, most)
        picked = [group[i] for group, i in zip(groups, solve(groups, limit), strict=True)]
        best = min(
            sum(o.error for o in some)
            for some in itertools.product(*groups)
            if sum(o.bytes for o in some) <= limit
        )  # fmt: skip
        assert sum(o.bytes for o in picked) <= limit
        assert sum(o.error for o in picked) == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_a_single_byte_decides():
    groups = [[Option(10**9, 1.0), Option(10**9 + 1, 0.0)], [Option(10**9, 1.0), Option(10**9 + 1, 0.5)]]
    assert solve(groups, 2 * 10**9) == [0, 0]
    assert solve(groups, 2 * 10**9 + 1) == [1, 0]
    assert solve(groups, 2 * 10**9 + 2) == [1, 1]
    with pytest.raises(BudgetError, match="least possible"):
        solve(groups, 2 * 10**9 - 1)


def test_budgets_in_words():
    assert parse("4.6 bits").bits * 10 == 46 and parse(" 4Bits ").bits == 4  # exact: 4.6 is no float
    assert parse("2.5 GiB").bytes == 5 * 2**29 and parse("1 MB").bytes == 10**6 and parse(".5kib").bytes == 512


@pytest.mark.parametrize(
    "text", ["", "4.6", "bits", "-4 bits", "0 bits", "4.6 apples", "1e3 bits", "4,6 bits", 4.6, None]
)
def test_what_is_no_budget_is_refused_with_the_form_that_is_wanted(text):
    with pytest.raises(BudgetError, match=r"'4.6 bits' or '2.1 GiB'"):
        parse(text)


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_best_of_all_assignments_and_fused_layers_are_equal(model, data, monkeypatch):
    seen = {}

    def spy(*args):
        seen["measured"] = measure(*args)
        return seen["measured"]

    measure = MODULE._measure
    monkeypatch.setattr(MODULE, "_measure", spy)
    with torch.no_grad():
        model[0].v.weight *= 30  # would get more bits than q and k
    budget = between(model, 0.5)
    found = allocate(model, budget, CANDIDATES, calibration=data, progress=False)
    measured = seen["measured"]
    groups = [["0.q", "0.k", "0.v"], ["0.out"], ["1.q", "1.k", "1.v"], ["1.out"], ["2"]]
    assert [c.layer for c in found.choices] == [n for group in groups for n in group]
    names = [c.name for c in CANDIDATES]
    weights = sum(c.weights for c in found.choices)
    best = None
    for picks in itertools.product(names, repeat=len(groups)):
        options = [measured[n][c] for group, c in zip(groups, picks, strict=True) for n in group]
        if 8 * sum(o.bytes for o in options) <= float(budget.split()[0]) * weights:
            error = sum(o.error for o in options)
            best = error if best is None else min(best, error)
    assert found.error == pytest.approx(best, rel=1e-9)
    chosen = {c.layer: c.candidate for c in found.choices}
    assert all(len({chosen[n] for n in group}) == 1 for group in groups)

    free = allocate(model, budget, CANDIDATES, calibration=data, group="none", progress=False)
    chosen = {c.layer: c.candidate for c in free.choices}
    assert chosen["0.v"] != "four" and "four" in (chosen["0.q"], chosen["0.k"])
    assert free.error < found.error


@pytest.mark.parametrize("budget", [0.3, 0.8, "20 KiB"])
def test_the_recipe_loads_and_meets_the_budget_as_plan_and_report_count_it(model, data, tmp_path, budget):
    budget = budget if isinstance(budget, str) else between(model, budget)
    found = allocate(model, budget, CANDIDATES, calibration=data, ranks=[4], progress=False)
    found.save(tmp_path / "mine.yaml")
    found.save(tmp_path / "mine.json")
    plan = Quantizer(model).plan(tmp_path / "mine.yaml")
    assert plan.bytes_after == found.bytes
    limit = parse(budget)
    if limit.bytes:
        assert found.bytes <= limit.bytes
    else:
        assert found.bits <= limit.bits
    chosen = {c.layer: c for c in found.choices}
    quantizer = Quantizer(model)
    quantized = quantizer.quantize(tmp_path / "mine.yaml", calibration=data, progress=False)
    assert {r.name: r.bytes_after for r in quantizer.report.layers} == {n: c.bytes for n, c in chosen.items()}
    assert storage_bytes(quantized) == found.bytes
    assert (
        8 * sum(r.bytes_after for r in quantizer.report.layers) / sum(c.weights for c in chosen.values()) == found.bits
    )
    saved = json.loads((tmp_path / "mine.json").read_text())
    assert saved["bits"] == found.bits and Recipe.from_dict(saved["recipe"]) == found.recipe
    assert [row["layer"] for row in saved["layers"]] == list(chosen)


def test_the_curve_falls_and_the_budget_lies_on_it(model, data):
    found = allocate(model, "7 bits", CANDIDATES, calibration=data, progress=False)
    points = [*found.curve]
    assert [p.bytes for p in points] == sorted({p.bytes for p in points})
    assert all(a.error > b.error for a, b in itertools.pairwise(points))
    assert all(sum(p.layers.values()) == 9 for p in points)
    for p in points:  # no point is better than the choice without being larger
        assert p.bytes > found.bytes or p.error >= found.error
    text = str(found)
    assert f"{found.bits:.2f}" in text and "eight" in text and RELATIVE.split(",")[0][:20] in text


def test_ranks_are_tried_and_named(model, data):
    found = allocate(model, "64 bits", [CANDIDATES[0]], calibration=data, ranks=[0, 4, 8, 4], progress=False)
    assert {c.candidate for c in found.choices} == {"four rank 8"}
    schemes = [rule.scheme for rule in found.recipe.rules]
    assert [dict(s.options)["rank"] for s in schemes] == [8] and schemes[0].name == "w4a16"


def test_the_model_stays_as_it_was(model, data):
    model.train()
    model[0].q.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():  # gradients are switched on inside
        allocate(model, "8 bits", CANDIDATES, calibration=data, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["bits", "bytes"])
def test_a_budget_that_cannot_be_met_names_the_least_that_can(model, data, kind, monkeypatch):
    least = Quantizer(model).plan(CANDIDATES[0])
    monkeypatch.setattr(MODULE, "probe", lambda *args: pytest.fail("measured first"))
    with pytest.raises(BudgetError) as error:
        allocate(model, "3 bits" if kind == "bits" else "1 KiB", CANDIDATES, calibration=data)
    layers = least.todo
    bits = 8 * sum(x.bytes_after for x in layers) / sum(x.weights for x in layers)
    assert (f"{bits:.3f} bits" if kind == "bits" else f"({least.bytes_after} bytes)") in str(error.value)
    monkeypatch.undo()
    found = allocate(model, f"{least.bytes_after} B", CANDIDATES, calibration=data, progress=False)
    assert {c.candidate for c in found.choices} == {"four"} and found.bytes == least.bytes_after


def test_a_candidate_may_leave_layers_in_float(model, data):
    spared = Recipe.from_dict(
        {"name": "spared", "scheme": {"name": "w4a16", "rounding": "rtn"}, "rules": [{"match": ["2"], "skip": "head"}]}
    )
    found = allocate(model, "64 bits", [spared, CANDIDATES[0]], calibration=data, progress=False)
    chosen = {c.layer: c for c in found.choices}
    assert chosen["2"].candidate == "spared" and chosen["2"].error == 0
    assert chosen["2"].bytes == storage_bytes(model[2])
    quantized = Quantizer(model).quantize(found.recipe, progress=False)
    assert type(quantized[2]) is nn.Linear and type(quantized[0].q) is W4A16Linear


def test_layers_that_the_data_does_not_reach_are_judged_by_their_weight(data):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.never = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match=r"did not reach never.*judged by the error of the weight"):
        found = allocate(Branches(), "64 bits", CANDIDATES[:2], calibration=data, progress=False)
    assert all(c.candidate == "eight" and c.error > 0 for c in found.choices)


def test_a_candidate_that_does_not_suit_a_layer_is_not_chosen_there(data):
    factors = recipe("factors", "factorized", energy=0.9999)  # no smaller than a full-rank weight
    model = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(40, 2) @ torch.randn(2, 40))
    found = allocate(model, "64 bits", [factors, CANDIDATES[0]], calibration=data, progress=False)
    assert [c.candidate for c in found.choices] == ["four", "factors"]
    quantized = Quantizer(model).quantize(found.recipe, calibration=data, progress=False)
    assert type(quantized[1]) is FactorizedLinear and storage_bytes(quantized) == found.bytes


def test_names_that_look_like_patterns_mean_one_layer_only(data):
    model = nn.ModuleDict({"Linear": nn.Linear(48, 48), "a[b]": nn.Linear(48, 48), "*": nn.Linear(48, 48)})
    model.forward = lambda x: model["*"](30 * model["a[b]"](model["Linear"](x)))
    found = allocate(model, between(model, 0.7), CANDIDATES[:2], calibration=data, progress=False)
    chosen = {c.layer: c.candidate for c in found.choices}
    assert set(chosen.values()) == {"four", "eight"}
    quantized = Quantizer(model).quantize(found.recipe, progress=False)
    kinds = {"four": W4A16Linear, "eight": W8A16Linear}
    assert {n: type(quantized[n]) for n in chosen} == {n: kinds[c] for n, c in chosen.items()}


def test_a_bare_linear_is_a_model_too(data):
    found = allocate(nn.Linear(48, 48), "10 bits", CANDIDATES, calibration=data, progress=False)
    assert isinstance(Quantizer(nn.Linear(48, 48)).quantize(found.recipe), W8A16Linear | W8A8Linear)


def test_what_cannot_be_chosen_among_is_refused_before_any_work(model, data, monkeypatch):
    monkeypatch.setattr(MODULE, "probe", lambda *args: pytest.fail("measured first"))
    with pytest.raises(PlanError, match="four is there more than once"):
        allocate(model, "8 bits", [CANDIDATES[0], CANDIDATES[0]], calibration=data)
    with pytest.raises(PlanError, match="at least one candidate"):
        allocate(model, "8 bits", [], calibration=data)
    with pytest.raises(ValueError, match="'fused' or 'none', not 'auto'"):
        allocate(model, "6 bits", CANDIDATES, calibration=data, group="auto")
    with pytest.raises(PlanError, match="quantizes a layer"):
        allocate(nn.Sequential(nn.ReLU()), "8 bits", CANDIDATES, calibration=data)
    with pytest.raises(PlanError, match="quantized already, give the float model"):
        allocate(Quantizer(model).quantize("w8a16"), "8 bits", CANDIDATES, calibration=data)
    embed = nn.Sequential(nn.Embedding(30, 48), nn.Linear(48, 30))
    rules = {"name": "e", "scheme": "w8a16", "rules": [{"match": ["Embedding"], "scheme": "embedding_w8"}]}
    with pytest.raises(PlanError, match="leave embeddings and tied weights"):
        allocate(embed, "8 bits", [Recipe.from_dict(rules)], calibration=data)


def test_without_scipy_the_message_has_the_command(model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'qgraft\[allocate\]'"):
        allocate(model, "8 bits", CANDIDATES, calibration=data)


def test_data_that_cannot_be_differentiated_is_an_error_in_words(data):
    class Frozen(nn.Sequential):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(CalibrationError, match="no_grad"):
        allocate(Frozen(nn.Linear(48, 48), nn.Linear(48, 48)), "10 bits", CANDIDATES, calibration=data, progress=False)


# -- the prediction ----------------------------------------------------------------------------------------------------


def perturbed(linear: nn.Linear, size: float):
    """A layer of ours that is off by a little: a stand-in for a quantized one."""
    layer = W8A16Linear.from_linear(linear)
    noise = size * torch.randn_like(linear.weight)
    layer._linear = lambda x: F.linear(x, linear.weight + noise, linear.bias)
    return layer


def run(batches):
    return lambda model: [model(batch) for batch in batches]


@pytest.mark.parametrize("which", ["0.q", "1.out", "2"])
def test_the_predicted_cost_is_the_squared_relative_error_that_the_layer_causes(model, which):
    batches = [torch.randn(1, 64, 48) for _ in range(8)]
    probed = probe(model, {which: model.get_submodule(which)}, run(batches))
    assert probed.metric == RELATIVE
    linear = model.get_submodule(which)
    layer = perturbed(linear, 1e-3)
    predicted = probed.probes[which].cost(linear, layer)
    with torch.no_grad():
        exact = torch.cat([model(x) for x in batches]).double()
        parent, _, leaf = which.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = layer
        truth = ((torch.cat([model(x) for x in batches]).double() - exact).norm() / exact.norm()).item() ** 2
    assert predicted == pytest.approx(truth, rel=0.35)  # random signs: 512 samples of a squared sum


def test_of_a_language_model_it_is_the_kl_divergence():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(50, 48), nn.Sequential(Block(), Block())
            self.head = nn.Linear(48, 50)

        def forward(self, ids):
            return SimpleNamespace(logits=self.head(self.blocks(self.embed(ids))))

    model = Language()
    batches = [torch.randint(0, 50, (1, 64)) for _ in range(8)]
    name = "blocks.0.out"
    linear = model.get_submodule(name)
    probed = probe(model, {name: linear}, run(batches))
    assert probed.metric == KL
    layer = perturbed(linear, 0.02)
    predicted = probed.probes[name].cost(linear, layer)
    with torch.no_grad():
        log_p = torch.cat([model(x).logits[0] for x in batches]).double().log_softmax(-1)
        model.blocks[0].out = layer
        log_q = torch.cat([model(x).logits[0] for x in batches]).double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert predicted == pytest.approx(truth, rel=0.5)


def test_siblings_are_what_reads_the_same_tensor_in_the_same_module(data):
    class Cross(nn.Module):
        """Two blocks whose k read one and the same memory; they are no siblings."""

        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()
            self.x, self.y = nn.ModuleDict({"k": nn.Linear(48, 9), "v": nn.Linear(48, 9)}), nn.Linear(48, 9)

        def forward(self, h):
            memory = h.tanh()
            other = self.x["k"](memory) + self.x["v"](memory) + self.y(memory)
            return self.b(self.a(h)).sum() + other.sum()

    model = Cross()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = probe(model, layers, run(data)).siblings
    assert sorted(found) == sorted(
        [["a.q", "a.k", "a.v"], ["a.out"], ["b.q", "b.k", "b.v"], ["b.out"], ["x.k", "x.v"], ["y"]]
    )


def test_schemes_that_need_other_statistics_compete(data):
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))
    names = ["w4a4_svd", "w8a8_static", "w8a32"]
    found = allocate(model, "999 bits", names, calibration=data, progress=False)
    assert {c.candidate for c in found.choices} == {"w8a32"}
    assert qgraft.Allocation is type(found)


def test_a_weight_of_low_rank_is_given_to_two_factors():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    net = Net()
    thin = torch.randn(128, 6) @ torch.randn(6, 128) / 12
    net.layers[1].weight.data = thin + 1e-3 * torch.randn(128, 128)
    data = [torch.randn(32, 128) for _ in range(8)]
    found = qgraft.allocate(net, "4.6 bits", ["w4a16", "w8a16", "factorized_w8"], ranks=[8, 16], calibration=data)
    chosen = {pattern: rule.scheme.name for rule in found.recipe.rules for pattern in rule.match if rule.scheme}
    assert chosen["layers.1"] == "factorized_w8"
    assert {chosen[f"layers.{i}"] for i in (0, 2, 3)} <= {"w4a16", "w8a16"}
