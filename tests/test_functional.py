"""qgraft.functional: codes, scales and zero points, against float64 and at the edges."""

import pytest
import torch

import qgraft
import qgraft.functional as QF

BITS = range(2, 9)


def every_way(x, bits, symmetric):
    """(result, scale as wide as x) of every granularity, for x (6, 40)."""
    groups = QF.quantize_per_group(x, 8, bits, symmetric)
    yield QF.quantize_per_tensor(x, bits, symmetric)
    yield QF.quantize_per_channel(x, bits, symmetric)
    yield QF.quantize_per_channel(x, bits, symmetric, axis=-1)
    yield QF.quantize_per_token(x, bits, symmetric)
    yield groups


def wide(values, x):
    return values.repeat_interleave(x.shape[-1] // values.shape[-1], -1) if values.ndim else values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_the_definition_in_float64(bits, symmetric, dtype):
    x = (torch.randn(6, 40) * torch.randn(40).exp() + torch.randn(6, 1)).to(dtype)
    last = 2 ** (bits - 1) - 1
    first = -last if symmetric else -last - 1
    for codes, scale, zero_point in every_way(x, bits, symmetric):
        assert codes.dtype is zero_point.dtype is torch.int8 and scale.dtype is torch.float32
        assert codes.shape == x.shape and scale.shape == zero_point.shape
        assert codes.min() >= first and codes.max() <= last and codes.unique().numel() > 1
        exact, s, z = x.float().double(), wide(scale, x).double(), wide(zero_point, x).double()
        ideal = ((exact / s).round() + z).clamp(first, last)
        tie = ((exact / s).frac().abs() - 0.5).abs() < 1e-4  # in float32 it may fall to either side
        assert ((codes.double() - ideal).abs() <= tie).all()
        real = QF.dequantize(codes, scale, zero_point)
        torch.testing.assert_close(real.double(), s * (codes.double() - z), rtol=1e-6, atol=0)
        at_the_ends = (codes == first) | (codes == last)
        error = (real.double() - exact).abs() / s
        assert (error[~at_the_ends] <= 0.5001).all() and error.max() <= (0.5001 if symmetric else 1.0001)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_span_the_range_of_what_they_stand_for(symmetric):
    x = torch.randn(3, 5, 24).double() + 0.3

    def expected(part, dims):
        if symmetric:
            return part.abs().amax(dims) / 127
        return (part.amax(dims).clamp_min(0) - part.amin(dims).clamp_max(0)) / 255

    cases = [
        (QF.quantize_per_tensor(x, 8, symmetric), expected(x, (0, 1, 2))),
        (QF.quantize_per_channel(x, 8, symmetric), expected(x, (1, 2)).view(3, 1, 1)),
        (QF.quantize_per_channel(x, 8, symmetric, axis=1), expected(x, (0, 2)).view(1, 5, 1)),
        (QF.quantize_per_channel(x, 8, symmetric, axis=-1), expected(x, (0, 1)).view(1, 1, 24)),
        (QF.quantize_per_token(x, 8, symmetric), expected(x, -1)[..., None]),
        (QF.quantize_per_group(x, 6, 8, symmetric), expected(x.unflatten(-1, (4, 6)), -1)),
    ]
    for result, scale in cases:
        torch.testing.assert_close(result.scale.double(), scale, rtol=1e-5, atol=0)
        assert (QF.dequantize(*result).double() - x).norm() < 0.02 * x.norm()


def test_it_agrees_with_torchs_own_affine_quantization():
    x = torch.randn(7, 33) * 3 + 1
    codes, scale, zero_point = QF.quantize_per_tensor(x, 8, symmetric=False)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), -128, 127)
    torch.testing.assert_close(QF.dequantize(codes, scale, zero_point), theirs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_constants_are_exact(bits, symmetric):
    for value in (0.0, 3.7, -2.5, 1e-20, -3e38, 3e38):
        x = torch.full((2, 8), value)
        for result in every_way(torch.full((6, 40), value), bits, symmetric):
            torch.testing.assert_close(QF.dequantize(*result), torch.full((6, 40), value), rtol=1e-6, atol=0)
        x[0, 0] = 0  # 0 is exact beside anything
        assert QF.dequantize(*QF.quantize_per_tensor(x, bits, symmetric))[0, 0] == 0


def test_scalars_and_vectors_work():
    assert QF.dequantize(*QF.quantize_per_tensor(torch.tensor(2.0))).item() == pytest.approx(2.0)
    assert QF.quantize_per_token(torch.randn(9)).scale.shape == (1,)
    assert QF.quantize_per_channel(torch.randn(9)).scale.shape == (9,)
    each = QF.quantize_per_channel(torch.tensor([-3.0, 0.0, 2.0]), symmetric=False)  # from zero to the one number
    assert each.codes.tolist() == [-128, -128, 127] and each.zero_point.tolist() == [127, -128, -128]
    torch.testing.assert_close(QF.dequantize(*each), torch.tensor([-3.0, 0.0, 2.0]))


@pytest.mark.parametrize("bits", BITS)
def test_absmax_quantize_gives_codes_and_what_they_stand_for(bits):
    x = (torch.randn(5, 30) * 0.1).half()
    codes, real = QF.absmax_quantize(x, bits)
    last = 2 ** (bits - 1) - 1
    assert codes.abs().max() == last and real.dtype is torch.float16
    step = x.double().abs().max() / last
    torch.testing.assert_close(real.double(), codes.double() * step, rtol=2e-3, atol=1e-6)
    mirrored, _ = QF.absmax_quantize(-x, bits)
    assert torch.equal(mirrored, -codes)


FUNCTIONS = [
    QF.quantize_per_tensor,
    QF.quantize_per_channel,
    QF.quantize_per_token,
    lambda x, bits=8: QF.quantize_per_group(x, 2, bits),
    QF.absmax_quantize,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_cannot_be_quantized_is_refused_in_words(function):
    x = torch.randn(3, 4)
    for bits in (1, 9, 0, -3, 4.0, "8"):
        with pytest.raises(ValueError, match="2 to 8"):
            function(x, bits)
    for bad in (float("nan"), float("inf")):
        x[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(x)
    with pytest.raises(ValueError, match="floating-point"):
        function(torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="nothing to quantize"):
        function(torch.empty(0, 4))
    with pytest.raises(ValueError, match="beyond float32"):
        function(torch.full((2, 2), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("group_size", [3, 0, -2, 8])
def test_groups_that_do_not_fit_are_refused(group_size):
    with pytest.raises(ValueError, match=f"groups of {group_size} do not divide"):
        QF.quantize_per_group(torch.randn(2, 4), group_size)
    with pytest.raises(ValueError, match="3 groups do not divide"):
        QF.dequantize(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 3))
    with pytest.raises(ValueError, match="axis 2"):
        QF.quantize_per_channel(torch.randn(2, 4), axis=2)


def test_it_is_there_when_qgraft_is_imported():
    assert qgraft.functional is QF
