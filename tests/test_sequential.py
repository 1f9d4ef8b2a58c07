"""Sequential calibration: chains of blocks found by their tensors, and weights that make up for what came before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, Recipe
from qgraft.layers.algorithms.compensation import DAMPINGS, USUAL, compensate, search_damping
from qgraft.quantizer import CalibrationError, calibration, quantizer
from qgraft.quantizer.chain import find_chain
from qgraft.recipes import CalibrationSpec

WIDTH = 32


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def runner(data):
    return calibration.make_runner(data, CalibrationSpec(samples=10_000), progress=False)


def recipe(scheme="w4a16", sequential=True, **more):
    options = {"name": scheme, "group_size": 32, "rotate": False} if scheme == "w4a16" else {"name": scheme}
    spec = {"samples": 10_000, "sequential": sequential}
    return Recipe.from_dict({"scheme": options | more, "min_features": 1, "calibration": spec})


class Block(nn.Module):
    """Residual, with a fan-in of three, and a keyword that every block gets."""

    def __init__(self, width=WIDTH, in_place=False):
        super().__init__()
        self.norm, self.in_place = nn.LayerNorm(width), in_place
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x, scale=None):
        h = self.norm(x)
        h = self.out(F.gelu(self.a(h)) * torch.sigmoid(self.b(h)) + self.c(h)) * scale
        return x.add_(h) if self.in_place else x + h


class Parting(Block):
    """The input of b is that of a in every other call, and twice that in the others."""

    calls = 0

    def forward(self, x, scale=None):
        h = self.norm(x)
        self.calls += 1
        return x + self.out(self.a(h) + self.b(h if self.calls % 2 else 2 * h) + self.c(h)) * scale


class Model(nn.Module):
    def __init__(self, blocks=4, broken=(), twice=False, pair=False, in_place=False, block=Block):
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block(in_place=in_place) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.broken, self.twice, self.pair = broken, twice, pair

    def forward(self, x):
        x, scale = self.inp(x), torch.full((), 1.5)
        for i, block in enumerate(self.blocks):
            if i in self.broken:
                x = x * 1.0
            x = block(x, scale=scale)
            if self.twice:
                x = block(x, scale=scale)
        return self.head(x)


@pytest.fixture
def data():
    mix = torch.randn(WIDTH, WIDTH) / WIDTH**0.5  # features that depend on one another: something to make up with
    return [torch.randn(4, 16, WIDTH) @ mix for _ in range(24)]


def quantized(model, data, **options):
    quantizer = Quantizer(copy.deepcopy(model))
    return quantizer.quantize(recipe(**options), calibration=data, progress=False), quantizer.report


@pytest.mark.parametrize("broken", [(), (2,)])
def test_the_model_comes_closer_to_the_float_one(data, broken):
    torch.manual_seed(0)
    model = Model(6, broken=broken).eval()
    train, test = data[:-4], torch.cat(data[-4:])
    exact = model(test)
    once, _ = quantized(model, train, sequential=False)
    step_by_step, report = quantized(model, train)
    assert relative(step_by_step(test), exact) < 0.93 * relative(once(test), exact)
    assert len(report.layers) == 26 and all(row.tokens == 20 * 64 for row in report.layers)


@pytest.mark.parametrize("options", [{}, {"in_place": True}, {"broken": (1, 3)}, {"block": Parting}], ids=str)
def test_what_the_layers_are_calibrated_with_is_what_they_get_in_the_end(data, monkeypatch, options):
    """The statistics of each layer are those of its inputs in the finished model."""
    model, taken = Model(**options).eval(), {}
    original = quantizer.graft

    def watched(model, planned, stats, *rest):
        taken[planned.name] = (stats.second_moment, stats.drift_moment)
        return original(model, planned, stats, *rest)

    monkeypatch.setattr(quantizer, "graft", watched)
    float_model = copy.deepcopy(model)
    Quantizer(model).quantize(recipe(), calibration=data, progress=False)
    names = [f"blocks.{i}.{name}" for i in range(4) for name in ("a", "b", "c", "out")]
    got = {which: inputs_of(m, names, data) for which, m in (("noisy", model), ("exact", float_model))}
    for name in names:
        exact, noisy = got["exact"][name].double(), got["noisy"][name].double()
        moment, drift = taken[name]
        assert relative(moment, noisy.t() @ noisy / len(noisy)) < 1e-4
        if options.get("in_place") is None or drift is not None:
            assert relative(drift + moment, exact.t() @ noisy / len(noisy)) < 1e-4


def test_layers_that_read_one_tensor_share_their_statistics(data, monkeypatch):
    taken = {}
    original = quantizer.graft

    def watched(model, planned, stats, *rest):
        taken[planned.name] = stats
        return original(model, planned, stats, *rest)

    monkeypatch.setattr(quantizer, "graft", watched)
    Quantizer(Model(2).eval()).quantize(recipe(), calibration=data, progress=False)
    for block in ("blocks.0", "blocks.1"):
        a, b, c, out = (taken[f"{block}.{name}"] for name in ("a", "b", "c", "out"))
        assert a is b is c is not out


def inputs_of(model, names, data):
    seen = {name: [] for name in names}

    def hook(name):
        return lambda module, args: seen[name].append(args[0].detach().clone().flatten(0, -2))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_layers_that_do_not_round_leave_the_rest_as_it_was(data):
    """With nothing lost there is nothing to make up for: bit for bit the result of one pass over the float model."""
    model = Model(2).eval()
    spec = {"samples": 100}
    rules = [{"match": "blocks.1.out", "scheme": {"name": "w4a16", "group_size": 32}}]
    both = []
    for sequential in (True, False):
        whole = Recipe.from_dict({"rules": rules, "min_features": 1, "calibration": spec | {"sequential": sequential}})
        both.append(Quantizer(copy.deepcopy(model)).quantize(whole, calibration=data, progress=False).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(both[0].values(), both[1].values(), strict=True))


LAYERS = {f"blocks.{i}.out" for i in range(4)}


def test_chains_are_found_by_tensors(data):
    chain = find_chain(Model(), LAYERS, runner(data))
    assert chain.blocks == [f"blocks.{i}" for i in range(4)]
    assert [chain.is_head(block) for block in chain.blocks] == [True, False, False, False]
    parted = find_chain(Model(broken=(2,)), LAYERS, runner(data))
    assert [parted.is_head(block) for block in parted.blocks] == [True, False, True, False]


class Stateful(Model):
    """Its blocks get an object that could keep state from one call to the next, as a cache of keys and values does."""

    def forward(self, x):
        x, memory = self.inp(x), type("Memory", (), {"__rmul__": lambda self, other: other})()
        for block in self.blocks:
            x = block(x, scale=memory)
        return self.head(x)


class Stages(nn.Module):
    """Lists in a list, with something between them, as vision models have it."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

    def forward(self, x):
        for stage in self.stages:
            x = x * 1.0
            for block in stage:
                x = block(x, scale=1.0)
        return x


def test_lists_of_lists_are_chains_of_the_modules_in_them(data):
    model = Stages().eval()
    chain = find_chain(model, {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}, runner(data))
    assert chain.blocks == [f"stages.{i}.{j}" for i in range(2) for j in range(2)]
    assert [chain.is_head(block) for block in chain.blocks] == [True, False, True, False]
    report = quantized(model, data)[1]
    assert all(row.tokens == 24 * 64 for row in report.layers)


def test_a_sequence_of_blocks_is_a_chain_where_there_is_no_list(data):
    """As vision models of timm have it."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
            self.blocks = nn.Sequential(*(Unscaled() for _ in range(4)))

        def forward(self, x):
            return self.head(self.blocks(self.stem(x)))

    class Unscaled(Block):
        def forward(self, x):
            return super().forward(x, 1.0)

    model = Encoder().eval()
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert find_chain(model, names, runner(data)).blocks == [f"blocks.{i}" for i in range(4)]
    train, test = data[:-4], torch.cat(data[-4:])
    once, step_by_step = (quantized(model, train, sequential=s)[0](test) for s in (False, True))
    assert relative(step_by_step, model(test)) < relative(once, model(test))


def test_a_decoder_with_a_configuration_of_its_own_is_in_the_chain():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batches = [{n: torch.randint(50, (2, 7)) for n in ("input_ids", "decoder_input_ids")} for _ in range(3)]
    chain = find_chain(model, {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}, runner(batches))
    assert chain.blocks == [f"{half}.block.{i}" for half in ("encoder", "decoder") for i in range(2)]
    assert model.config.use_cache and model.decoder.config.use_cache
    report = quantized(model, batches)[1]
    assert len(report.layers) == 32 and all(row.tokens == 42 for row in report.layers)


def test_where_there_is_no_chain_one_pass_over_the_float_model_does(data):
    assert find_chain(Model(twice=True), LAYERS, runner(data)) is None
    assert find_chain(Stateful(), LAYERS, runner(data)) is None
    assert find_chain(Model(7, broken=range(7)), {f"blocks.{i}.a" for i in range(7)}, runner(data)) is None
    assert find_chain(Model(), {"blocks.1.a", "blocks.1.b"}, runner(data)) is None  # one block is no chain
    assert find_chain(nn.Sequential(nn.Linear(WIDTH, WIDTH)), {"0"}, runner(data)) is None
    assert find_chain(Model(), LAYERS, runner(lambda model: model(data[0]))) is None
    model = Model(twice=True).eval()
    exact = model(data[0])
    assert relative(quantized(model, data)[0](data[0]), exact) < 0.3


def test_blocks_that_are_linear_layers_themselves(data):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Stack()
    exact = model(data[0])
    result, report = quantized(model, data)
    assert [row.name for row in report.layers] == ["layers.0", "layers.1", "layers.2"]
    assert relative(result(data[0]), exact) < 0.3


def test_a_block_that_some_batches_skip_and_a_layer_that_no_batch_reaches(data):
    class Skips(Model):
        def forward(self, x):
            x = self.inp(x)
            for block in self.blocks if x.shape[0] > 1 else self.blocks[:2]:
                x = block(x, scale=torch.ones(()))
            return x

    assert find_chain(Skips(), LAYERS, runner([data[0], data[0][:1]])) is None

    class Spare(Model):
        def __init__(self):
            super().__init__()
            self.blocks[1].spare = nn.Linear(WIDTH, WIDTH)

    with pytest.warns(UserWarning, match=r"did not reach blocks\.1\.spare \(1 in all\)"):
        _, report = quantized(Spare(), data)
    assert {row.name: row.tokens for row in report.layers}["blocks.1.spare"] == 0


def test_the_model_gets_its_flags_back_and_nan_is_named(data):
    model = Model().train()
    quantized_model, _ = quantized(model, data)
    assert all(module.training for module in quantized_model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in quantized_model.modules())
    data[3][1, 2, 5] = torch.nan
    inner = {"match": "blocks.*", "scheme": {"name": "w4a16", "group_size": 32}}
    for sequential, where in ((True, "'blocks.0.a', calibration batch 3: "), (False, r"batch 3\)$")):
        spec = {"rules": [inner], "min_features": 1, "calibration": {"sequential": sequential}}
        with pytest.raises(CalibrationError, match=where):
            Quantizer(Model()).quantize(Recipe.from_dict(spec), calibration=data)


def test_compensation_solves_the_least_squares_problem():
    k, n, tokens = 24, 7, 4000
    exact = torch.randn(tokens, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64)
    noisy = exact + 0.3 * torch.randn_like(exact) + 0.1 * exact.roll(1, 1)
    weight = torch.randn(n, k, dtype=torch.float64)
    solution = torch.linalg.lstsq(noisy, exact @ weight.t()).solution.t()
    moment, drift = moments_of(exact, noisy)
    assert relative(compensate(weight.float(), moment, drift, damping=1e-6), solution) < 1e-3
    # Much damping holds it to the weight, and so do no drift and no data at all.
    assert relative(compensate(weight.float(), moment, drift, damping=1e6), weight) < 1e-4
    assert torch.equal(compensate(weight.float(), moment, torch.zeros(k, k), 0.1), weight.float())
    assert torch.equal(compensate(weight.float(), torch.zeros(k, k), drift, 0.1), weight.float())


def moments_of(exact, noisy):
    """(second_moment, drift_moment)"""
    return (noisy.t() @ noisy / len(noisy)).float(), ((exact - noisy).t() @ noisy / len(noisy)).float()


def sums_of(exact, noisy):
    moment, drift = moments_of(exact, noisy)
    return moment * len(noisy), drift * len(noisy), len(noisy)


def test_the_damping_is_the_one_that_does_best_on_the_other_half():
    k, n = 32, 12
    mix, weight = torch.randn(k, k, dtype=torch.float64) / k**0.5, torch.randn(n, k)

    def streams(tokens, drift, noise):
        exact = torch.randn(tokens, k, dtype=torch.float64) @ mix
        return exact, exact + drift * exact.roll(1, 1) + noise * torch.randn_like(exact)

    def best(tokens, drift, noise):
        halves = [streams(tokens, drift, noise) for _ in range(2)]
        found = search_damping(weight, [sums_of(*half) for half in halves])

        def error(damping):
            total = 0.0
            for fit, test in (halves, halves[::-1]):
                made_up = compensate(weight, *moments_of(*fit), damping) if damping else weight
                total += (test[0] @ weight.double().t() - test[1] @ made_up.double().t()).square().sum()
            return total

        assert error(found) <= 1.0001 * min(error(damping) for damping in (None, USUAL, *DAMPINGS))
        return found or float("inf")

    # A drift that is the same everywhere, much data; little data; and nothing but noise to learn from.
    many, few = best(4000, 0.3, 0.1), best(24, 0.3, 0.5)
    assert many == DAMPINGS[0] < few
    assert best(20, 0.0, 0.3) > USUAL
    assert search_damping(weight, []) == USUAL


def test_activations_near_the_end_of_float32_leave_the_weight_as_it_is():
    weight, huge = torch.randn(4, 8), torch.full((8, 8), 1e38)
    assert search_damping(weight, [(huge, huge, 1), (huge, huge, 1)]) is None
