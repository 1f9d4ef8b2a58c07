"""Zero points of 4-bit activations: 16 codes a group, from its least to its largest, folded into an int8 as before."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgraft
from qgraft import SVDQW4A4Linear, SVDQW4A8Linear
from qgraft.kernels import ops, reference


def rounded(x, group_size=64, rotate=False, act_zero_point=True):
    codes, scale, _ = ops.svdq_quantize(x, None, None, x.shape[1], group_size, rotate, True, 4, act_zero_point)
    return codes, codes * scale


def decibels(x, y):
    return 10 * ((x - y).square().sum() / x.square().sum()).log10().item()


def inputs(m, k):
    """What layers see: GELU's outputs, everything on one side, far from 0, constant, and outliers."""
    normal = torch.randn(m, k)
    return torch.cat((normal, F.gelu(2 * normal), normal.abs() + 3, normal * 0 + 5, normal * 0, normal * 1e4,
                      normal.pow(3) * torch.rand(m, 1).mul(20).exp()))  # fmt: skip


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("rotate", [True, False])
def test_a_group_has_at_most_16_values_a_step_apart_that_an_int8_holds(group_size, rotate):
    x = inputs(9, 512)
    codes, seen = rounded(x, group_size, rotate)
    assert codes.abs().max() <= 126  # and 127 * 128 bounds what one product adds to a sum
    for group in codes.unflatten(-1, (-1, group_size)).flatten(0, 1)[::7].tolist():
        step = math.gcd(*(code - min(group) for code in group)) or 1
        assert max(group) - min(group) <= 15 * step
    if not rotate:
        constant = slice(27, 36)
        assert torch.allclose(seen[constant], x[constant], rtol=1e-5)  # of no range: its whole number of fine steps


def test_what_it_is_worth():
    normal = torch.randn(64, 1024)
    for x, rotate, gain in ((normal, True, 0.5), (F.gelu(2 * normal), False, 3.5), (F.gelu(2 * normal), True, 0.5)):
        target = reference.rotate_groups(x, 64) if rotate else x
        symmetric, asymmetric = (decibels(target, rounded(x, 64, rotate, zero)[1]) for zero in (False, True))
        assert asymmetric < symmetric - gain, (asymmetric, symmetric)


def test_the_layers_have_them_with_two_level_scales_and_can_go_without():
    linear, x, data = nn.Linear(256, 96), torch.randn(40, 256), torch.randn(300, 256)
    made = {
        options: SVDQW4A4Linear.from_linear(linear, calibration=data, **dict(options))
        for options in ((), (("act_zero_point", False),), (("act_zero_point", True),), (("scales", "group"),))
    }
    y = {options: layer(x) for options, layer in made.items()}
    assert [layer.scheme.uses_act_zero_point for layer in made.values()] == [True, False, True, False]
    assert torch.equal(y[()], y[(("act_zero_point", True),)])
    truth = linear(x)
    assert decibels(truth, y[()]) < decibels(truth, y[(("act_zero_point", False),)]) - 0.2


def test_where_there_are_none_the_recipe_says_so_before_any_work():
    linear = nn.Sequential(nn.Linear(64, 64))
    for scheme, words in (
        ({"name": "w4a4_svd", "scales": "group", "act_zero_point": True}, "needs scales: two_level, not group"),
        ({"name": "w4a8_svd", "act_zero_point": True}, "has no option 'act_zero_point'"),
    ):
        with pytest.raises(qgraft.quantizer.errors.PlanError, match=words):
            qgraft.Quantizer(linear).plan(qgraft.Recipe.from_dict({"scheme": scheme}))
    assert not SVDQW4A8Linear(64, 64).scheme.uses_act_zero_point


def test_a_saved_model_computes_the_same(tmp_path):
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(5, 128)
    for number, zero in enumerate((None, False)):
        scheme = {"name": "w4a4_svd", "rank": 4} | ({} if zero is None else {"act_zero_point": zero})
        quantized = qgraft.Quantizer(copy.deepcopy(model)).quantize(
            qgraft.Recipe.from_dict({"scheme": scheme}), progress=False
        )
        qgraft.save(quantized, tmp_path / str(number))
        again = qgraft.load(tmp_path / str(number), model=copy.deepcopy(model))
        assert again[0].scheme.uses_act_zero_point is (zero is None)
        assert torch.equal(again(x), quantized(x))
