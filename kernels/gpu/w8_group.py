"""W8 in groups: the weight is dequantized into a copy in the type of the activations, and torch multiplies.

The copy is taken from torch's allocator and goes back to it after the product. One kernel, for any number of tokens:
with few of them it costs more than reading the codes alone would, about as much as a 16-bit layer and a half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import require
from .common import FLOATS, launch


@triton.jit
def dequantize_kernel(qweight_ptr, scale_ptr, zero_ptr, out_ptr, K, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tl.cdiv(K, BLOCK)).to(tl.int64)
    offs = tl.program_id(0) % tl.cdiv(K, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    group = row * groups + offs // GROUP
    w = tl.load(qweight_ptr + row * K + offs, mask=mask, other=0).to(tl.float32)
    if zero_ptr is not None:
        w -= tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    w *= tl.load(scale_ptr + group, mask=mask, other=0.0)
    tl.store(out_ptr + row * K + offs, w.to(out_ptr.dtype.element_ty), mask=mask)


def w8_group_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_group_linear`; the dequantized weight is rounded to x's type."""
    op = "w8_group_linear"
    (m, k), n, groups = x.shape, qweight.shape[0], triton.cdiv(qweight.shape[1], group_size)
    x = require(op, x, "x", x, FLOATS, m, k)
    qweight = require(op, x, "qweight", qweight, (torch.int8,), n, k)
    scale = require(op, x, "scale", scale, (torch.float32,), n, groups)
    zero_point = require(op, x, "zero_point", zero_point, (torch.int8,), n, groups)
    bias = require(op, x, "bias", bias, FLOATS, n)
    if m * n == 0:
        return x.new_empty(m, n)
    weight = qweight.new_empty(n, k, dtype=x.dtype)
    launch(
        dequantize_kernel, n * triton.cdiv(k, 2048), qweight, scale, zero_point, weight, k, groups,
        GROUP=group_size, BLOCK=2048, num_warps=4,
    )  # fmt: skip
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())
