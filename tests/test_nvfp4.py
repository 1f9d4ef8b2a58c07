"""NVFP4, the format and its reference. The kernel's tests are with those of the other GPU kernels."""

import pytest
import torch

from qgraft.kernels.nvfp4 import E2M1, e2m1_codes, nvfp4_dequantize, nvfp4_linear, nvfp4_quantize

VALUES = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)


def relative(y, truth) -> float:
    return ((y.double() - truth.double()).norm() / truth.double().norm()).item()


def test_every_number_gets_the_nearest_code_and_ties_the_even_one():
    x = torch.cat([torch.randn(2000) * 3, torch.arange(-30, 31) / 4.0])
    codes = e2m1_codes(x)
    distance = (x.double()[:, None] - VALUES).abs()
    assert torch.equal((x - VALUES[codes.long()]).abs(), distance.amin(1))
    tie = (distance == distance.amin(1, keepdim=True)).sum(1) == 2
    tie &= VALUES[codes.long()] != 0  # zero has two codes, and is not a tie
    assert tie.sum() >= 10 and codes[tie].bitwise_and(1).eq(0).all()


@pytest.mark.parametrize("k", [1, 16, 77, 1024])
def test_codes_scales_and_rows_give_the_numbers_back(k):
    x = torch.randn(9, k) * torch.rand(9, 1).mul(20).sub(10).exp()
    codes, scale, row_scale = nvfp4_quantize(x)
    groups = -(-k // 16)
    assert codes.shape == (9, 8 * groups) and scale.shape == (9, groups) and row_scale.shape == (9,)
    assert scale.float().amax(1).eq(448).all()  # the whole range of e4m3 is used
    again = (nvfp4_dequantize(codes, scale) * row_scale[:, None])[:, :k]
    # Half a step of 2 next to 6, and what a rounded scale (1 in 16, at most) adds at the end of the range.
    largest = torch.nn.functional.pad(x.abs(), (0, -k % 16)).unflatten(1, (-1, 16)).amax(-1).repeat_interleave(16, 1)
    assert ((again - x).abs() <= largest[:, :k] * (1 / 6 + 1 / 16)).all()
    if k == 1024:
        assert relative(again, x) < 0.11


def test_numbers_that_the_format_holds_are_kept_exactly():
    step = torch.tensor([448.0, 32.0, 0.5, 2**-9]).repeat_interleave(16)
    x = (VALUES.float().repeat(4) * step)[None]
    codes, scale, row_scale = nvfp4_quantize(x)
    assert torch.equal(nvfp4_dequantize(codes, scale) * row_scale, x)


def test_the_product_is_that_of_the_codes_and_near_that_of_the_numbers():
    x, weight, bias = torch.randn(7, 500), torch.randn(33, 500), torch.randn(33)
    y = nvfp4_linear(x, *nvfp4_quantize(weight), bias)
    (a, a_scale, a_row), (w, w_scale, w_row) = nvfp4_quantize(x), nvfp4_quantize(weight)
    a, w = nvfp4_dequantize(a, a_scale) * a_row[:, None], nvfp4_dequantize(w, w_scale) * w_row[:, None]
    assert relative(y, a.double() @ w.double().t() + bias) < 1e-6
    assert 0.05 < relative(y, x @ weight.t() + bias) < 0.2
    assert nvfp4_linear(x.bfloat16(), *nvfp4_quantize(weight), None).dtype == torch.bfloat16


def test_zeros_stay_zero_and_nan_and_infinity_stay_in_their_rows():
    weight = nvfp4_quantize(torch.randn(4, 40))
    x = torch.randn(4, 40)
    x[0], x[1, 3], x[2, 39] = 0, float("nan"), float("inf")
    y = nvfp4_linear(x, *weight, None)
    assert y[0].eq(0).all() and not y[1:3].isfinite().any() and y[3].isfinite().all()
