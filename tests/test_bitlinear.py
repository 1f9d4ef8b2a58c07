"""BitNet b1.58: the op, the layer, training with straight-through gradients, and the layout of transformers."""

import pytest
import torch

from qgraft.kernels import ops, reference
from qgraft.kernels.packing import pack_ternary, unpack_ternary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def op_args(dtype=torch.float32, m=5, k=77, n=33, bias=True):
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    args = torch.randn(m, k).to(dtype), pack_ternary(codes), torch.rand(n) + 0.1, torch.randn(n).to(dtype)
    return codes, args if bias else (*args[:3], None)


# ---- packing and the op ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 64, 77])
def test_ternary_packing_round_trips_and_pads_with_code_0(k):
    codes = torch.randint(-1, 2, (3, 5, k), dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.shape == (3, 5, -(-k // 4)) and packed.dtype is torch.uint8
    back = unpack_ternary(packed)
    assert torch.equal(back[..., :k], codes) and not back[..., k:].any()


def test_ternary_packing_puts_the_first_code_in_the_lowest_bits():
    assert pack_ternary(torch.tensor([[-1, 0, 1, 1, 1]])).tolist() == [[0b10_10_01_00, 0b01_01_01_10]]
    for wrong in (-2, 2):
        with pytest.raises(ValueError, match="ternary codes are -1, 0 and 1"):
            pack_ternary(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", [(0, 48, 33), (1, 1, 1), (1, 130, 33), (17, 1024, 40), (65, 77, 300)])
def test_the_op_equals_its_formula_in_float64(dtype, m, k, n):
    for bias in (True, False):
        codes, args = op_args(dtype, m, k, n, bias)
        x, _, scale, b = args
        step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        act = (x.float() / step).round().double()
        exact = act @ codes.double().t() * step * scale + (b.double() if bias else 0)
        y = ops.bitnet_linear(*args)
        assert y.dtype is dtype and y.shape == (m, n)
        eps = torch.finfo(dtype).eps
        size = exact.abs().mean().item() if m else 0
        torch.testing.assert_close(y.double(), exact, rtol=3 * eps, atol=2 * eps * size)


@pytest.mark.parametrize("m", [1, 3, 16, 64])
def test_the_integer_sum_is_exact_in_the_worst_case(m):
    x, qweight = torch.full((m, 4096), 127.0), pack_ternary(torch.full((8, 4096), -1))
    assert torch.equal(ops.bitnet_linear(x, qweight, torch.ones(8), None), torch.full((m, 8), -127.0 * 4096))


def test_opcheck_passes_and_gradients_are_those_of_the_dequantized_weight():
    for bias in (True, False):
        _, (x, *rest) = op_args(bias=bias)
        torch.library.opcheck(ops.bitnet_linear.default, (x, *rest))
        torch.library.opcheck(ops.bitnet_linear.default, (x.requires_grad_(), *rest))
    grad = torch.randn(5, 33)
    ops.bitnet_linear(x, *rest).backward(grad)
    torch.testing.assert_close(x.grad, grad @ reference.bitnet_dequantize(77, *rest[:2]))
