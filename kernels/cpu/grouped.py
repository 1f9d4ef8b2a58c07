"""W8 in groups on a CPU: by the native kernel where it can be had, else block by block in torch."""

import torch
from torch import Tensor

from .. import reference
from ..operands import require
from . import native

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Features that the native kernel dequantizes with one scale.
UNIT = 32
# Of one float block of the weight where torch multiplies: it stays in a second-level cache.
BLOCK_ELEMENTS = 1 << 18


def w8_group_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_group_linear`.

    On a processor that multiplies bfloat16, activations of that type have the dequantized weight rounded to it too.
    """
    op, lib = "w8_group_linear", native.library()
    (m, k), n, groups = x.shape, qweight.shape[0], -(-qweight.shape[1] // group_size)
    qweight = require(op, x, "qweight", qweight, (torch.int8,), n, k)
    scale = require(op, x, "scale", scale, (torch.float32,), n, groups)
    zero_point = require(op, x, "zero_point", zero_point, (torch.int8,), n, groups)
    bias = require(op, x, "bias", bias if bias is None or bias.dtype in TYPES else bias.float(), tuple(TYPES), n)
    if lib is None or x.dtype not in TYPES or group_size % UNIT:
        return _in_blocks(x, qweight, scale, zero_point, bias, group_size)
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    act = x.contiguous()
    if lib.qg_w8_group(
        act.data_ptr(), TYPES[act.dtype], qweight.data_ptr(), scale.data_ptr(), _address(zero_point), _address(bias),
        0 if bias is None else TYPES[bias.dtype], y.data_ptr(), TYPES[y.dtype], m, n, k, group_size,
    ):  # fmt: skip
        raise MemoryError(f"{op}: no memory for the activations")
    return y


def _in_blocks(
    x: Tensor, qweight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    n, k = qweight.shape
    act = x.float()
    y = torch.empty(x.shape[0], n, dtype=torch.float32)
    rows = max(16, BLOCK_ELEMENTS // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        zeros = None if zero_point is None else zero_point[part]
        weight = reference.w8_group_dequantize(qweight[part], scale[part], zeros, group_size)
        torch.mm(act, weight.t(), out=y[:, part])
    return reference.add_bias(y, bias).to(x.dtype)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
