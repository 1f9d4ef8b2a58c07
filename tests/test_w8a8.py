"""W8A8: codes, zero points and static ranges, against float64, exact integers and torch's own quantized Linear."""

import warnings

import pytest
import torch
from torch import nn

from qgraft import Quantizer, Recipe, W8A8Linear, W8A8StaticLinear, functional
from qgraft.kernels import ops
from qgraft.layers import Stats
from qgraft.layers.algorithms.ranges import mse_range, percentile_range
from qgraft.quantizer.errors import CalibrationError

RANGES = ["minmax", "absmax", "percentile", "mse"]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def formula_in_float64(layer, x):
    """y = s_a s_w sum (qa - za) (qw - zw) + bias from the layer's buffers, written anew."""
    x = x.float().double()
    if layer.smooth_factor is not None:
        x = x / layer.smooth_factor.double()
    if layer.rotation:
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while len(hadamard) < 64:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
        x = nn.functional.pad(x, (0, -x.shape[1] % 64)).unflatten(1, (-1, 64)) @ hadamard / 8
        x = x.flatten(1)
    if isinstance(layer, W8A8StaticLinear):
        s, z = layer.act_scale.double(), layer.act_zero_point.double()
        codes = ((x / s).round() + z).clamp(-128, 127) - z
    else:
        s = x.abs().amax(1, keepdim=True) / 127
        codes = (x / s).round()
    weight = layer.qweight.double()
    if layer.zero_point is not None:
        weight = weight - layer.zero_point.double()[:, None]
    return (codes @ weight.t()) * s * layer.scale.double() + layer.bias.double()


@pytest.mark.parametrize("cls", [W8A8Linear, W8A8StaticLinear])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_equals_its_own_formula_in_float64(cls, zero_point, dtype):
    for k, n, m in ((77, 45, 9), (300, 130, 33), (513, 7, 16)):
        linear = nn.Linear(k, n).to(dtype)
        layer = cls.from_linear(linear, calibration=torch.randn(100, k) + 0.5, zero_point=zero_point)
        x = (torch.randn(m, k) + 0.5).to(dtype)
        exact = formula_in_float64(layer, x)
        error = (layer(x).double() - exact).norm(dim=1) / exact.norm(dim=1)
        # A value that float32 puts on the other side of a rounding tie moves its row by one step; that is rare.
        assert error.median() < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
        assert (error > 1e-2).sum() == 0
        # A value beyond the static range is cut off, and with one token it may be most of the error.
        assert relative(layer(x), linear(x)) < (0.06 if cls is W8A8StaticLinear else 0.02)


@pytest.mark.parametrize("cls", [W8A8Linear, W8A8StaticLinear])
@pytest.mark.parametrize("rotate, smooth", [(True, "none"), (True, "auto"), (False, "activations")])
def test_rotation_and_smoothing_keep_the_formula(cls, rotate, smooth):
    for k, n, m in ((77, 45, 9), (320, 130, 33)):
        linear = nn.Linear(k, n)
        outliers = torch.ones(k)
        outliers[::37] = 30.0
        calibration, x = torch.randn(200, k) * outliers, torch.randn(m, k) * outliers
        layer = cls.from_linear(linear, calibration=calibration, rotate=rotate, smooth=smooth)
        exact = formula_in_float64(layer, x)
        assert ((layer(x).double() - exact).norm(dim=1) / exact.norm(dim=1)).median() < 1e-5
        # What gradients flow through is the matrix seen from raw x.
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(gradient, layer.dequantize().sum(0).expand_as(x))


@pytest.mark.parametrize("cls", [W8A8Linear, W8A8StaticLinear])
@pytest.mark.parametrize("rotate, smooth", [(True, "none"), (True, "auto"), (False, "activations")])
def test_outliers_are_spread_over_their_group_or_moved_into_the_weights(cls, rotate, smooth):
    """A few channels set the step of all others unless something is done about it."""
    outliers = torch.ones(320)
    outliers[::97] = 60.0
    ratios = []
    for _ in range(5):  # one of a static layer's may be near 1
        linear, calibration, x = nn.Linear(320, 64), torch.randn(500, 320) * outliers, torch.randn(300, 320) * outliers
        layer = cls.from_linear(linear, calibration=calibration, rotate=rotate, smooth=smooth)
        plain = cls.from_linear(linear, calibration=calibration)
        ratios.append(relative(layer(x), linear(x)) / relative(plain(x), linear(x)))
    assert sum(ratios) / len(ratios) < 0.85


def test_smoothing_asks_for_data_and_rotation_pads():
    with pytest.raises(ValueError, match="smooth: activations needs calibration data"):
        W8A8Linear.from_linear(nn.Linear(70, 20), smooth="activations")
    layer = W8A8Linear.from_linear(nn.Linear(70, 20), rotate=True, smooth="auto")
    assert layer.qweight.shape == (20, 128) and layer.smooth_factor.eq(1).all()
    with pytest.raises(ValueError, match="padded must be a multiple of 64"):
        ops.w8a8_linear(torch.randn(2, 70), layer.qweight[:, :100], layer.scale, None, None, None, None, None, 64)


@pytest.mark.parametrize("m", [1, 3, 16, 65])
def test_integer_sums_are_exact_whatever_the_codes(m):
    k, n = 1031, 29
    x = torch.randint(-128, 128, (m, k))
    qweight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    zero, act_zero = torch.randint(-128, 128, (n,), dtype=torch.int8), torch.randint(-128, 128, (), dtype=torch.int8)
    exact = (x - act_zero.long()) @ (qweight.long() - zero.long()[:, None]).t()
    real = (x - act_zero.long()).float()  # with scale 1 the codes of these are x
    y = ops.w8a8_linear(real, qweight, torch.ones(n), zero, torch.tensor(1.0), act_zero, None)
    torch.testing.assert_close(y.double(), exact.double(), rtol=1e-6, atol=0.5)


def test_it_is_torchs_quantized_linear():
    """real = scale * (q - zero_point), as in torch.ao.nn.quantized; its activations are uint8, ours are 128 less."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantized Linear for the CPU")
    torch.backends.quantized.engine = "fbgemm"
    linear = nn.Linear(96, 40)
    calibration = torch.rand(500, 96) * 4 - 1
    layer = W8A8StaticLinear.from_linear(linear, calibration=calibration)
    x = torch.rand(30, 96) * 1.9 - 1  # the lower half of the codes: torch's kernel saturates beyond without VNNI
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_channel(
            layer.dequantize(), layer.scale.double(), torch.zeros(40, dtype=torch.long), 0, torch.qint8
        )
        theirs = torch.ao.nn.quantized.Linear(96, 40)
        theirs.set_weight_bias(weight, linear.bias.detach())
        exact = layer(x)
        theirs.scale, theirs.zero_point = exact.abs().max().item() / 127, 128
        quint8 = torch.quantize_per_tensor(x, layer.act_scale.item(), int(layer.act_zero_point) + 128, torch.quint8)
        y = theirs(quint8).dequantize()
    assert torch.equal(quint8.int_repr().int() - 128, functional_codes(layer, x))
    assert (y - exact).abs().max() <= 0.51 * theirs.scale  # which rounds its output to 8 bits


def functional_codes(layer, x):
    return ((x / layer.act_scale).round() + layer.act_zero_point).clamp(-128, 127).int()


def test_a_zero_point_helps_rows_that_lie_to_one_side():
    linear = nn.Linear(200, 50)
    linear.weight.data.uniform_(0.5, 1.0)
    errors = [relative(W8A8Linear.from_linear(linear, zero_point=z).dequantize(), linear.weight) for z in (False, True)]
    assert errors[1] < 0.7 * errors[0]


# ---- static ranges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RANGES)
def test_every_static_range_holds_zero_and_is_accurate_on_plain_data(method):
    linear, data = nn.Linear(64, 48), torch.randn(400, 64)
    layer = W8A8StaticLinear.from_linear(linear, calibration=data, act_range=method)
    assert relative(layer(data), linear(data)) < 0.03
    bias = layer.bias.detach().expand(3, -1)
    torch.testing.assert_close(layer(torch.zeros(3, 64)), bias, rtol=0, atol=1e-6)
    assert (layer.act_zero_point == 0) == (method == "absmax") or layer.act_zero_point.abs() < 30


def test_static_ranges_of_one_sided_data_use_all_codes():
    linear, data = nn.Linear(64, 48), nn.functional.gelu(torch.randn(400, 64) * 2)
    steps = {m: W8A8StaticLinear.from_linear(linear, calibration=data, act_range=m).act_scale for m in RANGES}
    assert steps["minmax"] < 0.6 * steps["absmax"]
    reach = data.max() - data.min()
    assert steps["minmax"].item() == pytest.approx(reach.item() / 255, rel=1e-4)


@pytest.mark.parametrize("seen", [(-60.0, 60.0), (-20.0, 90.0)])
def test_the_mse_range_is_the_best_of_all_in_squared_error(seen):
    x, importance = torch.randn(256, 300), torch.rand(300) + 0.1
    x[:3] = x[:3] * 15
    x.clamp_(*seen)

    def error(low, high):
        scale, zero = functional.scale_of_range(torch.tensor(low), torch.tensor(high), 8, symmetric=False)
        codes = ((x / scale).round() + zero).clamp(-128, 127)
        return ((functional.dequantize(codes, scale, zero) - x).square() @ importance).sum()

    shares = torch.linspace(0.1, 1, 10).tolist()
    best = error(*mse_range(x, importance, *seen))
    others = [error(*seen), error(*percentile_range(x, 99.9)), error(*percentile_range(x, 99.99))]
    others += [error(seen[0] * s, seen[1] * t) for s in shares for t in shares]
    assert best <= 1.05 * min(others) and best < 0.9 * error(*seen)


def test_the_mse_range_clips_where_the_weight_does_not_look():
    x = torch.randn(256, 64)
    x[:, 5] *= 100
    linear = nn.Linear(64, 32)
    looking = W8A8StaticLinear.from_linear(linear, calibration=x).act_scale
    linear.weight.data[:, 5] *= 1e-4
    assert W8A8StaticLinear.from_linear(linear, calibration=x).act_scale < 0.5 * looking


def test_a_percentile_is_that_of_the_values():
    x = torch.randn(40, 500) * 3 + 1
    for percentile in (99.99, 99.0, 75.0, 100.0):
        low, high = percentile_range(x, percentile)
        assert ((x <= high).float().mean() - percentile / 100).abs() < 1e-4
        assert ((x >= low).float().mean() - percentile / 100).abs() < 1e-4
    assert percentile_range(x, 100.0) == (x.min().item(), x.max().item())
    assert percentile_range(x[:1, :1], 99.0) == (x[0, 0].item(), x[0, 0].item())


def test_the_range_is_that_of_all_batches():
    stats = Stats(frozenset({"range"}))
    parts = [torch.randn(50, 8) * s for s in (1, 30, 5)]
    for part in parts:
        stats.update(part)
    whole = torch.cat(parts)
    assert stats.range == (whole.min().item(), whole.max().item())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 3e38, 1e-20])
def test_data_of_one_value_gives_a_finite_range(value):
    for method in RANGES:
        layer = W8A8StaticLinear.from_linear(nn.Linear(8, 4), calibration=torch.full((5, 8), value), act_range=method)
        assert torch.isfinite(layer.act_scale) and layer.act_scale > 0
        real = functional.dequantize(
            functional_codes(layer, torch.tensor(value)), layer.act_scale, layer.act_zero_point
        )
        assert real.item() == pytest.approx(value, rel=0.01)


def test_activations_beyond_calibration_are_clipped_not_wrapped():
    linear = nn.Linear(32, 8, bias=False)
    layer = W8A8StaticLinear.from_linear(linear, calibration=torch.rand(50, 32) * 2 - 1)
    edge = layer(torch.full((1, 32), 1.0))
    torch.testing.assert_close(layer(torch.full((1, 32), 1000.0)), edge, rtol=0.02, atol=0.02)


def test_static_without_data_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"w8a8_static needs calibration data.*or take w8a8"):
        W8A8StaticLinear.from_linear(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="needs calibration data"):
        W8A8StaticLinear.from_linear(nn.Linear(8, 8), stats=Stats(frozenset({"absmax"})))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    before = model[0].weight.clone()
    with pytest.raises(CalibrationError, match=r"layer '0': w8a8_static needs calibration data"):
        Quantizer(model).quantize(Recipe.from_dict({"scheme": "w8a8_static", "min_features": 1}), progress=False)
    assert torch.equal(model[0].weight, before)


def test_a_model_is_quantized_by_the_shipped_recipes():
    for recipe in ("w8a8", "w8a8_static"):
        model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
        x = torch.randn(60, 128)
        exact = model(x)
        model = Quantizer(model).quantize(recipe, calibration=[torch.randn(60, 128) for _ in range(3)], progress=False)
        assert model[2].scheme_name == recipe and relative(model(x), exact) < 0.03


@pytest.mark.parametrize(
    "options, message",
    [
        ({"act_range": "max"}, "act_range: Input should be 'mse'"),
        ({"percentile": 101.0}, "percentile: Input should be less than or equal to 100"),
        ({"percentile": 50.0}, "percentile: Input should be greater than 50"),
        ({"zero_point": 3}, "zero_point: Input should be a valid boolean"),
    ],
)
def test_bad_options_are_readable(options, message):
    with pytest.raises(ValueError) as error:
        W8A8StaticLinear.from_linear(nn.Linear(64, 64), calibration=torch.randn(4, 64), **options)
    assert message in str(error.value)
