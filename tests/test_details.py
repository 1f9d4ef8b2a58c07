"""What is recorded of a layer for the report, against the same numbers computed here."""

import pytest
import torch
from torch import nn

from qgraft import Quantizer, Recipe
from qgraft.layers import SCHEMES, Stats
from qgraft.quantizer.details import BINS, SINGULAR_VALUES, layer_details, rounded_input

ROUNDING = {
    "w8a8": {},
    "w8a8_static": {},
    "bitnet": {},
    "w4a4_svd": {"rank": 0},
    "w4a8_svd": {"rank": 0},
    "w4a4_svd groups": {"rank": 0, "scales": "group", "group_size": 16, "rotate": False},
    "w4a4_svd plain": {"rank": 0, "smooth": "none", "rotate": False},
}


def made(scheme, k=45, n=33, bias=False, **options):
    linear = nn.Linear(k, n, bias=bias)
    x = torch.randn(70, k) * torch.logspace(-1, 1, k)
    cls = SCHEMES[scheme.split()[0]]
    stats = Stats(cls.needs)
    stats.update(x)
    return linear, cls.from_linear(linear, stats=stats, **options), stats, x


@pytest.mark.filterwarnings("ignore:bitnet is a format to train in")
@pytest.mark.parametrize("scheme", ROUNDING)
def test_the_rounded_inputs_times_the_weights_are_the_output(scheme):
    # Whole groups: what rounding puts into the padding of others meets no column of dequantize().
    _, layer, _, x = made(scheme, 128, **ROUNDING[scheme])
    _, seen = rounded_input(layer, x)
    assert not torch.equal(seen, x)
    exact = seen.double() @ layer.dequantize().double().t()
    with torch.no_grad():
        off = ((layer(x) - exact).norm(dim=1) / exact.norm(dim=1)).sort().values
    # A rotation adds up in another order, so now and then a value in a token is on the other side of a rounding.
    assert (off[:-7] < 1e-4).all() and off[-1] < 0.1, off


@pytest.mark.parametrize("scheme", ["w8a16", "w8a32", "w4a16"])
def test_weight_only_layers_round_no_inputs(scheme):
    linear, layer, stats, x = made(scheme)
    assert rounded_input(layer, x) == (None, None)
    found = layer_details(linear.weight, layer, stats)["input"]
    assert found["after"] is None and found["peak_rounded"] is None and sum(found["before"]) == stats.sample.numel()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4_svd", "w4a16"])
def test_histograms_count_every_value_in_equal_bins_of_one_range(scheme):
    linear, layer, stats, _ = made(scheme)
    found = layer_details(linear.weight, layer, stats)
    for which, before, after in (
        ("weight", linear.weight.detach(), layer.dequantize()),
        ("input", stats.sample, rounded_input(layer, stats.sample)[1]),
    ):
        counts = found[which]
        assert len(counts["before"]) == BINS and sum(counts["before"]) == before.numel()
        low, high = counts["low"], counts["high"]
        tensors = [before] if after is None else [before, after]
        assert low == pytest.approx(min(t.min().item() for t in tensors), rel=1e-3)
        assert high == pytest.approx(max(t.max().item() for t in tensors), rel=1e-3)
        for name, tensor in zip(("before", "after"), tensors, strict=False):
            middle = (low + high) / 2
            # The ends are kept in a few digits, so a value at the middle may fall to either side.
            near = ((tensor - middle).abs() < 1e-3 * (high - low)).sum().item()
            assert abs(sum(counts[name][: BINS // 2]) - (tensor < middle).sum().item()) <= near


def test_a_weight_that_is_one_value_has_a_histogram():
    linear = nn.Linear(8, 8, bias=False)
    nn.init.constant_(linear.weight, 0.5)
    counts = layer_details(linear.weight, SCHEMES["w8a32"].from_linear(linear), None)["weight"]
    assert sum(counts["before"]) == sum(counts["after"]) == 64 and counts["low"] < 0.5 < counts["high"]


@pytest.mark.parametrize("scheme", ["w4a4_svd", "w4a16", "factorized", "factorized_w8", "w8a16"])
def test_singular_values_are_those_of_the_smoothed_weight(scheme):
    options = {"rank": 7} if "svd" in scheme or "factor" in scheme else {}
    linear, layer, stats, _ = made(scheme, 60, 50, **options)
    found = layer_details(linear.weight, layer, stats)["spectrum"]
    weight = linear.weight.detach().double()
    smooth = getattr(layer, "smooth_factor", None)
    weight = weight if smooth is None else weight * smooth.double()
    exact = torch.linalg.svdvals(weight)
    assert torch.allclose(torch.tensor(found["values"], dtype=torch.float64), exact, rtol=1e-2, atol=1e-3)
    assert found["energy"] == pytest.approx(exact.square().sum().item(), rel=1e-4)
    assert found["rank"] == options.get("rank", 0)


def test_a_large_weight_keeps_only_the_leading_singular_values():
    linear, layer, stats, _ = made("w8a16", 300, 260)
    values = layer_details(linear.weight, layer, stats)["spectrum"]["values"]
    exact = torch.linalg.svdvals(linear.weight.detach().double())[: len(values)]
    assert len(values) == SINGULAR_VALUES
    assert torch.allclose(torch.tensor(values, dtype=torch.float64), exact, rtol=0.03)


def test_recording_changes_nothing_of_the_model_and_its_random_numbers():
    data, weights = torch.randn(40, 48), torch.randn(40, 48)
    found = []
    for details in (False, True):
        model = nn.Sequential(nn.Linear(48, 40, bias=False), nn.Linear(40, 48, bias=False))
        model[0].weight.data, model[1].weight.data = weights.clone(), weights.t().clone()
        torch.manual_seed(5)
        quantizer = Quantizer(model)
        recipe = Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 4}, "min_features": 1})
        model = quantizer.quantize(recipe, calibration=data, progress=False, details=details)
        assert all((row.details is not None) == details for row in quantizer.report.layers)
        found.append((model.state_dict(), torch.rand(3)))
    (state, random), (other, other_random) = found
    assert torch.equal(random, other_random)
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_an_embedding_has_a_histogram_and_no_spectrum():
    model = nn.Sequential(nn.Embedding(50, 16))
    rules = [{"match": ["Embedding"], "scheme": "embedding_w8"}]
    quantizer = Quantizer(model)
    quantizer.quantize(Recipe.from_dict({"rules": rules, "min_features": 1}), progress=False, details=True)
    details = quantizer.report.layers[0].details
    assert sum(details["weight"]["after"]) == 800 and details["spectrum"] is None and details["input"] is None
