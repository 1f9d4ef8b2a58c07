"""What each layer promises, compared with float64 and with the layer's own dequantized weight."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft.kernels.packing import pack_int4, unpack_group_scale, unpack_int4
from qgraft.layers import (
    SCHEMES,
    BitNetLinear,
    FactorizedLinear,
    FactorizedW8Linear,
    QuantLinear,
    Stats,
    SVDQW4A4Linear,
    SVDQW4A8Linear,
    W4A16Linear,
    W4GroupLinear,
    W8A8Linear,
    W8A8StaticLinear,
    W8A16Linear,
    W8A32Linear,
)

ALL = list(SCHEMES.values())
INT4 = (SVDQW4A4Linear, SVDQW4A8Linear, W4A16Linear, W4GroupLinear)
FACTORIZED = (FactorizedLinear, FactorizedW8Linear)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 2), (64, 64), (77, 45), (130, 33), (200, 96)]


def make(cls, k=64, n=48, bias=True, dtype=torch.float32, calibration=None, **options):
    linear = nn.Linear(k, n, bias).to(dtype)
    return linear, quantized(cls, linear, calibration, **options)


def quantized(cls, linear, calibration=None, **options):
    """A layer of any class: with a rank that fits, and with data if it cannot do without."""
    k, n = linear.in_features, linear.out_features
    if issubclass(cls, SVDQW4A4Linear):
        options = {"rank": min(8, k, n)} | options
    if calibration is None and cls.make_scheme(**options).needs_data():
        calibration = torch.randn(200, k)
    return cls.from_linear(linear, calibration=calibration, **options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def float64_product(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ layer.dequantize().double().t() + bias


# ---- the contract, the same for all ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)])
def test_any_leading_shape_comes_back_in_the_dtype_of_the_input(cls, dtype, shape):
    _, layer = make(cls)
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.shape == (*shape[:-1], 48) and y.dtype is dtype
    flat = layer(x.reshape(-1, 64)).reshape(y.shape)
    assert torch.equal(y, flat)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("k, n", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_any_sizes_work_and_the_weight_is_near_the_original(cls, k, n, bias):
    if cls in FACTORIZED and k * n == 1:
        with pytest.raises(ValueError, match="a 1 x 1 weight has no factors that are smaller than itself"):
            make(cls, k, n, bias)
        return
    linear, layer = make(cls, k, n, bias)
    assert layer.dequantize().shape == (n, k)
    # Of three values a few weights may lose most of themselves.
    ternary = 0.6 if k * n > 100 else 0.95
    limit = 0.15 if cls in INT4 else ternary if cls is BitNetLinear else 0.95 if cls in FACTORIZED else 0.01
    assert relative(layer.dequantize(), linear.weight) < limit
    y = layer(torch.randn(7, k))
    assert y.shape == (7, n) and torch.isfinite(y).all()


@pytest.mark.parametrize("cls", ALL)
def test_strides_do_not_matter(cls):
    _, layer = make(cls)
    x = torch.randn(64, 10).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    wide = torch.randn(10, 128)[:, ::2]
    assert torch.equal(layer(wide), layer(wide.contiguous()))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_to_x_is_that_of_the_dequantized_layer(cls, dtype):
    _, layer = make(cls, 77, 45, dtype=dtype)
    x = torch.randn(3, 5, 77, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 45).to(dtype)
    layer(x).backward(grad)
    expected = grad.double() @ layer.dequantize().double()
    exact = dtype is torch.float32 and cls not in (W8A16Linear, W4A16Linear)  # which work in 16 bits, backwards too
    assert relative(x.grad, expected) < (1e-6 if exact else 5e-3)
    assert relative(layer.bias.grad, grad.double().sum((0, 1))) < 5e-3


@pytest.mark.parametrize("cls", ALL)
def test_a_frozen_bias_gets_no_gradient(cls):
    _, layer = make(cls)
    layer.bias.requires_grad_(False)
    layer(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert layer.bias.grad is None


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_moves_the_bias_and_leaves_codes_and_scales(cls, dtype):
    _, layer = make(cls)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    layer.to(dtype)
    assert layer.dtype is dtype and layer.bias.dtype is dtype and layer.weight.dtype is dtype
    for name, buffer in layer.named_buffers():
        assert buffer.dtype is before[name].dtype and torch.equal(buffer, before[name])
    x = torch.randn(4, 64).to(dtype)
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("cls", ALL)
def test_state_dict_fills_a_fresh_layer_and_one_on_meta(cls):
    _, layer = make(cls, 77, 45)
    x = torch.randn(4, 77)
    for device in ("cpu", "meta"):
        fresh = cls(77, 45, scheme=layer.scheme, device=device)
        fresh.load_state_dict(layer.state_dict(), strict=True, assign=device == "meta")
        assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("cls", ALL)
def test_from_linear_leaves_the_linear_alone_and_shares_its_bias(cls):
    linear = nn.Linear(32, 24).eval()
    before = linear.weight.clone()
    layer = quantized(cls, linear)
    assert torch.equal(linear.weight, before)
    assert layer.bias is linear.bias and layer.training is False


@pytest.mark.parametrize("cls", ALL)
def test_errors_say_what_was_wrong(cls):
    _, layer = make(cls)
    with pytest.raises(ValueError, match=r"\(\*, 64\), got \(3, 65\)"):
        layer(torch.randn(3, 65))
    with pytest.raises(ValueError, match="int64"):
        layer(torch.ones(3, 64, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one feature"):
        cls(0, 4)
    with pytest.raises(ValueError, match="nonsense"):
        cls(64, 64, nonsense=1)
    with torch.device("meta"):
        linear = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="meta"):
        quantized(cls, linear)
    broken = nn.Linear(64, 64)
    broken.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantized(cls, broken)


def test_repr_names_sizes_and_options():
    _, layer = make(SVDQW4A4Linear, rank=4)
    assert "in_features=64, out_features=48, bias=True, rank=4, group_size=64" in repr(layer)


def test_the_registry_knows_every_layer_by_its_recipe_name():
    assert SCHEMES["w8a32"] is W8A32Linear and SCHEMES["w8a16"] is W8A16Linear
    assert SCHEMES["w4a4_svd"] is SVDQW4A4Linear and SCHEMES["w4a8_svd"] is SVDQW4A8Linear
    assert SCHEMES["w8a8"] is W8A8Linear and SCHEMES["w8a8_static"] is W8A8StaticLinear
    assert SCHEMES["w4a16"] is W4A16Linear and SCHEMES["bitnet"] is BitNetLinear
    assert SCHEMES["factorized"] is FactorizedLinear and SCHEMES["factorized_w8"] is FactorizedW8Linear


@pytest.mark.parametrize("cls", ALL)
def test_zero_rows_zero_weights_and_zero_inputs_stay_zero(cls):
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data[:5] = 0
    options = {"rank": 0} if issubclass(cls, SVDQW4A4Linear) else {}
    layer = quantized(cls, linear, **options)
    assert layer(torch.randn(3, 64))[:, :5].abs().max() == 0
    assert layer(torch.zeros(3, 64)).abs().max() == 0
    linear.weight.data.zero_()
    assert quantized(cls, linear, **options).dequantize().abs().max() == 0


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [W8A32Linear, W8A16Linear])
@pytest.mark.parametrize("dtype, std", [(torch.bfloat16, 0.02), (torch.float16, 1e-3), (torch.float16, 1e-5)])
def test_w8_never_flips_the_sign_of_the_largest_weight(cls, dtype, std):
    linear = nn.Linear(512, 512, bias=False).to(dtype)
    linear.weight.data.normal_(0, std)
    layer = cls.from_linear(linear)
    largest = linear.weight.abs().argmax(1, keepdim=True)
    original, quantized = (w.float().gather(1, largest) for w in (linear.weight, layer.dequantize()))
    assert (original.sign() == quantized.sign()).all()
    assert relative(layer.dequantize(), linear.weight) < 0.012


@pytest.mark.parametrize("cls", [W8A32Linear, W8A16Linear])
def test_w8_searched_steps_are_no_worse_than_absmax_in_any_row(cls):
    weight = torch.randn(64, 300) * torch.rand(64, 1)
    linear = nn.Linear(300, 64, bias=False)
    linear.weight.data.copy_(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    plain = ((weight / step).round() * step - weight).square().sum(1)
    searched = (cls.from_linear(linear).dequantize() - weight).square().sum(1)
    assert (searched <= plain * 1.0001).all() and searched.sum() < plain.sum()


def test_w8a16_does_not_overflow_float16_where_raw_codes_would():
    linear = nn.Linear(4096, 32, bias=False).half()
    linear.weight.data.uniform_(0.005, 0.01)
    layer = W8A16Linear.from_linear(linear)
    x = torch.rand(20, 4096).half() + 0.5  # the raw codes sum to 400,000, float16 ends at 65,504
    assert relative(layer(x), float64_product(layer, x)) < 1e-3


@pytest.mark.parametrize("tokens", [1, 2, 17, 65, 300])
@pytest.mark.parametrize("k, n", [(4096, 96), (130, 515), (33, 7)])
def test_w8a32_equals_the_float64_product_to_1e_6(tokens, k, n):
    _, layer = make(W8A32Linear, k, n)
    x = torch.randn(tokens, k)
    assert relative(layer(x), float64_product(layer, x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 65, 300])
@pytest.mark.parametrize("k, n", [(1024, 96), (130, 515), (33, 7)])
def test_w8a16_equals_the_float64_product_to_the_rounding_of_its_dtype(dtype, tokens, k, n):
    _, layer = make(W8A16Linear, k, n, dtype=dtype)
    x = torch.randn(tokens, k).to(dtype)
    exact = float64_product(layer, x)
    error = (layer(x).double() - exact).abs()
    # Two roundings: of the sum and, after scale and bias, of the result; then float32 sums of K terms.
    eps = torch.finfo(dtype).eps
    size = x.double().abs() @ layer.dequantize().double().abs().t()
    limit = eps * (exact.abs() + (exact - layer.bias.double()).abs()) + 1e-5 * size
    assert (error <= limit).all()


def test_w8a16_rounds_float32_activations_to_16_bits():
    _, layer = make(W8A16Linear, 256, 64)
    x = torch.randn(9, 256)
    assert relative(layer(x), float64_product(layer, x.bfloat16())) < 5e-3
    assert torch.equal(layer(x), layer(x.bfloat16().float()))
    _, in_half = make(W8A16Linear, 256, 64, dtype=torch.float16)
    assert in_half.activation_dtype is torch.float16
    _, by_option = make(W8A16Linear, 256, 64, dtype=torch.float32)
    assert by_option.activation_dtype is torch.bfloat16


def test_w8a32_keeps_float32_accuracy_for_16_bit_input():
    _, layer = make(W8A32Linear, 256, 64)
    x = torch.randn(9, 256).bfloat16()
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


# ---- W4A4 with the branch -------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"rank": 0},
    {"rank": 5, "scales": "group"},
    {"rank": 5, "scales": "group_half", "rotate": False},
    {"rotate": False},
    {"smooth": "none", "group_size": 32},
    {"group_size": 16, "scales": "group", "rotate": False, "smooth": "none", "rank": 0},
    {"group_size": 128, "rounding": "rtn", "svd": "exact"},
    {"zero_point": False},
    {"smooth": "none", "rotation_signs": "random", "iterations": 0},
]


def formula_in_float64(layer: SVDQW4A4Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer from its buffers, written anew, step by step, in float64."""
    s, g = layer.scheme, layer.scheme.group_size
    kp = layer.padded_features
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < g:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    h /= g**0.5
    act = x.double()
    if layer.smooth_factor is not None:
        act = act / layer.smooth_factor.double()
    act = F.pad(act, (0, kp - x.shape[1])).view(len(x), kp // g, g)
    if s.rotate:
        act = act @ h
    top = act.abs().amax(-1)
    last = 7 if layer.act_bits == 4 else 127
    if layer.act_bits == 8:
        step = top.amax(1, keepdim=True) / 127
    elif s.scales == "two_level":
        token = top.amax(1, keepdim=True) / (7.5 * 16)
        step = token * (top / (7.5 * token)).round().clamp(1, 16)
    else:
        step = top / 7
    low = torch.full_like(step, -last)
    high = -low
    if s.uses_act_zero_point:
        token = top.amax(1, keepdim=True) / 120
        least, most = act.amin(-1), act.amax(-1)
        step = token * ((most - least) / (15.5 * token)).round().clamp(1, 16)
        low = ((least + most) / 2 / step - 7.5).round()
        high = low + 15
    act = (act / step[..., None]).round().clamp(low[..., None], high[..., None]) * step[..., None]
    low, high = layer.qweight & 15, layer.qweight >> 4
    codes = torch.stack((low, high), -1).flatten(1).to(torch.int16)
    codes = torch.where(codes > 7, codes - 16, codes).double().view(-1, kp // g, g)
    steps = layer.scale.double()
    if layer.group_scale is not None:
        steps = steps[:, None] * (layer.group_scale % 16 + 1)
        codes = codes - (layer.group_scale // 16).double()[..., None] + 8
    y = act.flatten(1) @ (codes * steps[..., None]).flatten(1).t()
    if layer.proj_up is not None:
        y = y + (x.double() @ layer.proj_down.double()) @ layer.proj_up.double().t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("cls", [SVDQW4A4Linear, SVDQW4A8Linear])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k, n", [(192, 80), (77, 45)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_svdq_equals_its_own_formula_in_float64(cls, options, k, n, calibrated):
    calibration = torch.randn(300, k) if calibrated else None
    _, layer = make(cls, k, n, calibration=calibration, **options)
    x = torch.randn(33, k)
    error = (layer(x).double() - formula_in_float64(layer, x)).norm(dim=1)
    # A value that float32 puts on the other side of a rounding tie moves its row by one step; that is rare.
    size = formula_in_float64(layer, x).norm(dim=1)
    assert (error / size).median() < 1e-5
    assert ((error / size) > 1e-4).sum() <= 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_w4a4_codes_and_scales_stay_in_their_ranges(options):
    _, layer = make(SVDQW4A4Linear, 200, 96, calibration=torch.randn(100, 200), **options)
    codes = unpack_int4(layer.qweight)
    assert codes.min() >= -8 and codes.max() <= 7 and codes.unique().numel() > 8
    assert torch.equal(pack_int4(codes), layer.qweight)
    assert (layer.scale > 0).all()
    if layer.group_scale is not None:
        integer, zero_point = unpack_group_scale(layer.group_scale)
        assert (integer * (7 - zero_point.int())).max() <= 127 and (integer * (8 + zero_point.int())).max() <= 128
        assert integer.unique().numel() > 3 and bool((zero_point != 0).any()) is layer.scheme.uses_zero_point


@pytest.mark.parametrize("cls", [SVDQW4A4Linear, SVDQW4A8Linear])
def test_the_searched_alpha_is_no_worse_than_any_fixed_one(cls):
    k, n = 256, 96
    outliers = torch.ones(k)
    outliers[torch.randperm(k)[:5]] = 60.0
    linear, x = nn.Linear(k, n), torch.randn(600, k) * outliers
    stats = Stats(cls.needs)
    stats.update(x)
    options = dict(stats=stats, rounding="rtn", rank=4)
    y = linear(stats.sample)

    def error(layer):
        return (layer(stats.sample) - y).norm().item()

    searched = cls.from_linear(linear, **options)
    assert 0 <= searched.chosen_alpha <= 1
    fixed = {
        alpha: error(cls.from_linear(linear, smooth_alpha=alpha, **options)) for alpha in (0.0, 0.3, 0.5, 0.7, 1.0)
    }
    # It is searched on some of the outputs, by a quicker way than the layer is made in.
    assert error(searched) <= 1.1 * min(fixed.values()) < 0.9 * max(fixed.values())


def test_what_each_ingredient_is_worth():
    k, n = 256, 128
    outliers = torch.ones(k)
    outliers[torch.randperm(k)[:5]] = 60.0
    linear, x = nn.Linear(k, n), torch.randn(600, k) * outliers
    linear.weight.data += torch.randn(n, 3) @ torch.randn(3, k) * 0.2
    stats = Stats(SVDQW4A4Linear.needs)
    stats.update(x)
    worth = SVDQW4A4Linear.from_linear(linear, stats=stats, rank=8).ingredients(linear.weight.detach(), stats)
    assert set(worth) == {"smoothing", "rotation", "signs", "branch", "iterations", "gptq", "zero_points"}
    assert worth["smoothing"] > 1 and worth["branch"] > 1  # outliers in x and three strong directions in the weight
    plain = SVDQW4A4Linear.from_linear(linear, stats=stats, rank=0, rotate=False)
    assert set(plain.ingredients(linear.weight.detach(), stats)) == {"smoothing", "gptq", "zero_points"}


def test_w4a4_error_falls_with_each_ingredient_on_planted_outliers():
    k, n = 512, 384
    linear = nn.Linear(k, n, bias=False)
    linear.weight.data = torch.randn(n, k) * 0.02 + torch.randn(n, 4) @ torch.randn(4, k) * 0.02
    channels = torch.randperm(k)[:8]
    x = torch.randn(1200, k)
    x[:, channels] *= 25
    linear.weight.data[:, channels[:4]] *= 4
    train, test = x[:800], x[800:]
    exact = test @ linear.weight.t()

    def error(**options):
        options = dict(smooth_alpha=0.5, rounding="rtn") | options  # a searched alpha makes up for the rotation here
        layer = SVDQW4A4Linear.from_linear(linear, calibration=train, **options)
        return relative(layer(test), exact)

    naive = error(rank=0, smooth="none", rotate=False)
    svd = error(rank=32, smooth="none", rotate=False)
    smooth = error(rank=32, smooth="activations", rotate=False)
    rotated = error(rank=32, smooth="activations", rotate=True)
    assert naive > 1.02 * svd and svd > 1.1 * smooth and smooth > 1.05 * rotated, (
        naive,
        svd,
        smooth,
        rotated,
    )


def test_w4a4_gptq_lowers_the_output_error_of_correlated_inputs():
    linear = nn.Linear(256, 192, bias=False)
    x = torch.randn(2000, 40) @ torch.randn(40, 256) + 0.1 * torch.randn(2000, 256)
    train, test = x[:1500], x[1500:]

    def error(rounding):
        layer = SVDQW4A4Linear.from_linear(linear, calibration=train, rounding=rounding, rank=16)
        return relative(test @ layer.dequantize().t(), test @ linear.weight.t())

    assert error("gptq") < 0.8 * error("rtn")


@pytest.mark.parametrize("calibrated", [False, True])
def test_signs_take_the_common_mean_of_inputs_after_a_gelu_out_of_the_rotation(calibrated):
    linear, x = nn.Linear(512, 128), F.gelu(torch.randn(600, 512) + 1)
    y = linear(x[400:])
    calibration = x[:400] if calibrated else None

    def error(**options):
        return relative(SVDQW4A4Linear.from_linear(linear, calibration=calibration, **options)(x[400:]), y)

    plain, random, auto = error(rotation_signs="none"), error(rotation_signs="random"), error()
    assert random < 0.85 * plain and auto < 1.01 * random
    assert calibrated or auto == random


def test_signs_are_there_only_where_they_are_asked_for_or_cost_nothing():
    linear, x = nn.Linear(100, 64), torch.randn(80, 100)

    def factor(**options):
        return SVDQW4A4Linear.from_linear(linear, calibration=x, rank=4, **options).smooth_factor

    assert (
        factor(smooth="none") is None and factor(rotate=False).gt(0).all() and factor(rotation_signs="none").gt(0).all()
    )
    signs = factor(smooth="none", rotation_signs="searched")
    assert set(signs.tolist()) <= {-1.0, 1.0} and (factor(rotation_signs="random") < 0).any()
    assert torch.equal(factor(), factor())


def test_the_size_of_a_half_smooth_factor_does_not_depend_on_its_signs():
    linear, x = nn.Linear(128, 64), torch.randn(80, 128)
    options = dict(calibration=x, scales="group_half", smooth_alpha=0.5, rank=4)
    layers = [SVDQW4A4Linear.from_linear(linear, rotation_signs=s, **options) for s in ("none", "random")]
    assert torch.equal(layers[1].smooth_factor.abs(), layers[0].smooth_factor)
    assert torch.equal(layers[1].smooth_factor.bfloat16().float(), layers[1].smooth_factor)


@pytest.mark.parametrize("cls", [SVDQW4A4Linear, SVDQW4A8Linear, W4A16Linear])
def test_turns_of_branch_and_residual_lower_the_error_of_the_weight(cls):
    linear = nn.Linear(256, 200)

    def error(**options):
        return relative(cls.from_linear(linear, rank=16, **options).dequantize(), linear.weight)

    assert error(iterations=8) < 0.97 * error(iterations=0)
    assert error() == error(iterations=8)


def test_w4a4_group_scales_are_a_little_more_accurate_than_two_level_ones_without_zero_points_and_less_with():
    linear = nn.Linear(512, 256, bias=False)
    group, two_level, zero_points = (
        relative(SVDQW4A4Linear.from_linear(linear, rank=0, **options).dequantize(), linear.weight)
        for options in ({"scales": "group"}, {"zero_point": False}, {})
    )
    assert zero_points < 0.97 * group < group < two_level < 1.06 * group


def test_w4a8_holds_the_weights_of_w4a4_and_rounds_activations_five_times_finer():
    linear, x = nn.Linear(256, 192), torch.randn(100, 256)
    four, eight = (cls.from_linear(linear, rank=8) for cls in (SVDQW4A4Linear, SVDQW4A8Linear))
    assert torch.equal(four.dequantize(), eight.dequantize())
    exact = float64_product(four, x)
    assert relative(eight(x), exact) < 0.2 * relative(four(x), exact)
    assert relative(eight(x), linear(x)) < relative(four(x), linear(x))


@pytest.mark.parametrize("cls", [SVDQW4A4Linear, SVDQW4A8Linear, W8A8Linear, W8A8StaticLinear])
def test_sums_that_an_int32_cannot_hold_are_refused(cls):
    cls(66_000, 1, device="meta", **({"rank": 1} if issubclass(cls, SVDQW4A4Linear) else {}))
    with pytest.raises(ValueError, match=r"14\d{4} input features: an int32"):
        cls(140_000, 1, device="meta", **({"rank": 1} if issubclass(cls, SVDQW4A4Linear) else {}))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 65}, "rank 65 is more than a 64 x 64 weight has: choose rank <= 64"),
        ({"rank": -1}, "rank: Input should be greater than or equal to 0"),
        ({"group_size": 48}, "group_size: Input should be 16, 32, 64, 128 or 256"),
        ({"smooth": "yes"}, "smooth: Input should be 'auto'"),
        ({"smooth_alpha": 2.0}, "smooth_alpha: Input should be less than or equal to 1"),
        ({"rank": "32"}, "rank: Input should be a valid integer"),
        ({"rotate": False, "rotation_signs": "random"}, "rotation_signs: random has no rotation to serve"),
        ({"iterations": -1}, "iterations: Input should be greater than or equal to 0"),
    ],
)
def test_w4a4_bad_options_are_readable(options, message):
    with pytest.raises(ValueError) as error:
        SVDQW4A4Linear.from_linear(nn.Linear(64, 64), **options)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"smooth": "activations"}, {"rounding": "gptq"}, {"rotation_signs": "searched"}])
def test_w4a4_options_that_need_data_say_so(options):
    with pytest.raises(ValueError, match="needs calibration data"):
        SVDQW4A4Linear.from_linear(nn.Linear(64, 64), rank=4, **options)


def test_w4a4_with_channels_that_calibration_never_saw():
    x = torch.randn(200, 128)
    x[:, 10:50] = 0
    linear = nn.Linear(128, 64)
    layer = SVDQW4A4Linear.from_linear(linear, calibration=x)
    assert torch.isfinite(layer.dequantize()).all()
    assert relative(layer(x), linear(x)) < 0.15
