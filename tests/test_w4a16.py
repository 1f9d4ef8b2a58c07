"""W4A16: int4 in groups, with and without zero points, rotation, GPTQ and branch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, Recipe, W4A16Linear, load_recipe
from qgraft.kernels.packing import unpack_int4
from qgraft.layers.algorithms.gptq import gptq_int4
from qgraft.layers.algorithms.rounding import round_int4, search_group_ranges, search_group_steps
from qgraft.quantizer.errors import PlanError

OPTIONS = [
    {},
    {"zero_point": True},
    {"group_size": 32, "rotate": False},
    {"group_size": 128, "zero_point": True, "rank": 5},
    {"group_size": "channel", "rotate": False},
    {"group_size": "channel", "rotate": False, "zero_point": True, "rank": 3, "rounding": "rtn", "svd": "exact"},
]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def weight_in_float64(layer):
    """The effective weight from the layer's buffers, written anew: (N, K)."""
    n, g = layer.out_features, layer.group_size
    low, high = layer.qweight & 15, layer.qweight >> 4
    codes = torch.stack((low, high), -1).flatten(1).to(torch.int16)
    codes = torch.where(codes > 7, codes - 16, codes).double().view(n, -1, g)
    if layer.zero_point is not None:
        codes = codes - layer.zero_point.double()[..., None]
    weight = codes * layer.scale.double()[..., None]
    if layer.scheme.rotate:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < g:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
        weight = weight @ h / g**0.5
    weight = weight.flatten(1)[:, : layer.in_features]
    if layer.proj_up is not None:
        weight = weight + layer.proj_up.double() @ layer.proj_down.double().t()
    return weight


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibrated", [False, True])
def test_it_equals_its_own_formula_in_float64(options, dtype, calibrated):
    for k, n, m in ((192, 80, 17), (77, 45, 1)):
        linear = nn.Linear(k, n).to(dtype)
        layer = W4A16Linear.from_linear(linear, calibration=torch.randn(300, k) if calibrated else None, **options)
        half = torch.bfloat16 if dtype is torch.float32 else dtype
        assert layer.scale.dtype is half
        torch.testing.assert_close(layer.dequantize().double(), weight_in_float64(layer), rtol=1e-5, atol=1e-6)
        assert relative(layer.dequantize(), linear.weight) < (0.2 if layer.group_size > 128 or k < 100 else 0.16)
        x = torch.randn(m, k).to(dtype)
        exact = x.to(half).double() @ weight_in_float64(layer).t() + layer.bias.double()
        y = layer(x)
        assert y.dtype is dtype and relative(y, exact) < EPS[half]  # x' and y are each rounded once


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_and_zero_points_stay_in_their_ranges_and_use_them(options):
    layer = W4A16Linear.from_linear(nn.Linear(200, 96), calibration=torch.randn(100, 200), **options)
    codes = unpack_int4(layer.qweight)
    assert codes.unique().numel() == 16 and (layer.scale > 0).all()
    if layer.zero_point is not None:
        assert layer.zero_point.min() >= -8 and layer.zero_point.max() <= 7 and layer.zero_point.unique().numel() > 1


def test_smaller_groups_and_zero_points_are_more_accurate():
    linear = nn.Linear(512, 128, bias=False)
    linear.weight.data = torch.randn(128, 512) + 0.2 * torch.randn(128, 1)

    def error(**options):
        return relative(W4A16Linear.from_linear(linear, **options).dequantize(), linear.weight)

    by_group = [error(group_size=g, rotate=False) for g in (32, 64, 128, "channel")]
    assert by_group == sorted(by_group)
    assert error(zero_point=True) < error()
    assert error(rank=32) < error()


def test_a_zero_point_takes_up_groups_that_lie_to_one_side():
    linear = nn.Linear(256, 64)
    linear.weight.data.uniform_(1.0, 2.0)
    errors = [
        relative(W4A16Linear.from_linear(linear, zero_point=z, rotate=False).dequantize(), linear.weight)
        for z in (False, True)
    ]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_gptq_lowers_the_output_error_of_correlated_inputs(zero_point, rotate):
    linear = nn.Linear(256, 96, bias=False)
    x = torch.randn(2000, 40) @ torch.randn(40, 256) + 0.1 * torch.randn(2000, 256)
    train, test = x[:1500], x[1500:]

    def error(rounding):
        options = {"rounding": rounding, "zero_point": zero_point, "rotate": rotate}
        layer = W4A16Linear.from_linear(linear, calibration=train, **options)
        return relative(test @ layer.dequantize().t(), test @ linear.weight.t())

    assert error("gptq") < 0.8 * error("rtn") and error("auto") == error("gptq")


def test_the_rotation_helps_where_single_weights_stand_out():
    linear = nn.Linear(512, 128, bias=False)
    linear.weight.data[:, torch.randperm(512)[:16]] *= 12
    errors = [relative(W4A16Linear.from_linear(linear, rotate=r).dequantize(), linear.weight) for r in (False, True)]
    assert errors[1] < errors[0]


# ---- rounding with zero points --------------------------------------------------------------------------------------


def test_searched_ranges_beat_the_plain_ones():
    weight = torch.randn(40, 256).abs()
    weight[:, ::64] *= 2
    steps, zeros = search_group_ranges(weight, 64)

    def error(step, zero):
        step, zero = (t.float().repeat_interleave(64, 1) for t in (step, zero))
        return ((round_int4(weight, step, zero) - zero) * step - weight).square().sum()

    groups = weight.unflatten(1, (-1, 64))
    plain = groups.amax(-1) / 15  # all are positive, so ranges start at 0
    assert zeros.dtype is torch.int8 and steps.shape == zeros.shape == (40, 4)
    assert error(steps, zeros) < 0.97 * error(plain, torch.full_like(plain, -8))
    symmetric = search_group_steps(weight, 64)
    assert error(steps, zeros) < 0.6 * error(symmetric, torch.zeros_like(symmetric))


def test_gptq_on_white_inputs_is_rounding_to_nearest_with_zero_points_too():
    weight = torch.randn(30, 128) + 0.5
    steps, zeros = search_group_ranges(weight, 64)
    codes = gptq_int4(weight, steps, torch.eye(128), 64, zeros)
    wide, zero = steps.repeat_interleave(64, 1), zeros.repeat_interleave(64, 1)
    assert torch.equal(codes.float(), round_int4(weight, wide, zero))


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1e-6, 1e-3, 1.0, 3e3])
@pytest.mark.parametrize("zero_point", [False, True])
def test_float16_scales_neither_vanish_nor_overflow(std, zero_point):
    linear = nn.Linear(256, 64, bias=False).half()
    linear.weight.data.normal_(0, std)
    layer = W4A16Linear.from_linear(linear, zero_point=zero_point)
    # float16 has 16 steps below 1e-6: there the weight itself is coarse, and so is its scale.
    assert relative(layer.dequantize(), linear.weight) < (0.3 if std < 1e-5 else 0.15)


@pytest.mark.parametrize("zero_point", [False, True])
def test_groups_of_zeros_and_of_constants(zero_point):
    linear = nn.Linear(128, 32, bias=False)
    linear.weight.data[:5] = 0
    linear.weight.data[5:9] = 0.3
    layer = W4A16Linear.from_linear(linear, zero_point=zero_point, rotate=False)
    assert layer.dequantize()[:5].abs().max() == 0
    torch.testing.assert_close(layer.dequantize()[5:9], linear.weight[5:9].detach(), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 48}, "group_size: Input should be 32, 64, 128 or 'channel'"),
        (
            {"group_size": "channel"},
            "W4A16Linear: group_size: channel has no groups to rotate in; set rotate: false, or group_size: 128",
        ),
        ({"rank": 65}, "rank 65 is more than a 64 x 64 weight has: choose rank <= 64"),
        ({"rank": -1}, "rank: Input should be greater than or equal to 0"),
        ({"rounding": "best"}, "rounding: Input should be 'auto'"),
        ({"rounding": "gptq"}, "gptq needs calibration data"),
        ({"bits": 3}, "bits: Extra inputs are not permitted"),
    ],
)
def test_bad_options_are_readable(options, message):
    with pytest.raises(ValueError) as error:
        W4A16Linear.from_linear(nn.Linear(64, 64), **options)
    assert message in str(error.value)


def test_a_recipe_with_a_rotation_but_no_groups_is_refused_with_its_line():
    recipe = Recipe.from_yaml("scheme:\n  name: w4a16\n  group_size: channel\n", source="mine.yaml")
    with pytest.raises(PlanError, match=r"mine\.yaml:1: scheme: group_size: channel has no groups .* group_size: 128$"):
        Quantizer(nn.Linear(64, 64)).plan(recipe)


def test_the_shipped_recipes_mean_what_they_say():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    asym = Quantizer(model).plan("w4a16_asym").todo
    assert [(p.scheme_name, p.scheme.zero_point, p.scheme.rotate) for p in asym] == [("w4a16", True, True)] * 2
    plain = load_recipe("w4a16").scheme.options
    assert plain == W4A16Linear.make_scheme().model_dump()  # the file shows every option, with its default
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(20, 256)
    exact = model(x)
    model = Quantizer(model).quantize("w4a16", calibration=[torch.randn(64, 256)], progress=False)
    after = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert after < 0.15 * before and relative(model(x), exact) < 0.25
    assert F.cosine_similarity(model(x), exact).min() > 0.9
