"""The layers on a CPU without native kernels: blocks of rows dequantized into cache, torch's own product.

The float weight is never whole in memory: a block of rows is converted into one scratch buffer that stays in the
second-level cache, multiplied, and overwritten. Compared with `weight.float()` + F.linear that saves writing and
reading 4 bytes a weight through main memory, which is most of the time at few tokens.
"""

import torch
from torch import Tensor

from .. import reference
from ..packing import unpack_int4

# Bytes of scratch. A few tokens: half of a second-level cache. Many tokens: each block also makes MKL repack the
# activations, so blocks are larger; 16 MiB still bounds the memory.
SCRATCH_BYTES = 1 << 20
SCRATCH_BYTES_MANY = 1 << 24
MANY_TOKENS = 64
# ATen's bfloat16 x int8 kernel reads each weight once for a few tokens; beyond them blocks win.
INT8PACK_MAX_TOKENS = 16
# It reads past the end of rows that are no multiple of this (wrong sums or a crash, seen in torch 2.13).
INT8PACK_FEATURES = 16
# It crashes on operands that do not begin at a multiple of 16 or 32 bytes, such as tensors mapped from a file and
# views. What torch allocates begins at a multiple of 64.
INT8PACK_ALIGNMENT = 64
# bfloat16 products are done by the hardware (AMX or AVX512-BF16) or else by slow emulation.
FAST_BF16 = torch.cpu._is_avx512_bf16_supported()


def _rows_per_block(tokens: int, in_features: int, out_features: int, itemsize: int = 4) -> int:
    budget = SCRATCH_BYTES if tokens < MANY_TOKENS else SCRATCH_BYTES_MANY
    return max(16, min(out_features, budget // (itemsize * in_features)))


def _w8_blocks(x: Tensor, qweight: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ qweight^T with the product taken in `dtype`, in which every int8 is exact; (M, N) in that dtype."""
    out_features, in_features = qweight.shape
    act = x.to(dtype)
    y = torch.empty(x.shape[0], out_features, dtype=dtype)
    rows = _rows_per_block(x.shape[0], in_features, out_features, dtype.itemsize)
    scratch = torch.empty(rows, in_features, dtype=dtype)
    for start in range(0, out_features, rows):
        block = qweight[start : start + rows]
        weight = scratch[: block.shape[0]].copy_(block)
        torch.mm(act, weight.t(), out=y[:, start : start + rows])
    return y


def _finish(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y * scale  # float32, whatever y was
    if bias is not None:
        y += bias
    return y.to(dtype)


def w8a32_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_linear`."""
    return _finish(_w8_blocks(x, qweight, torch.float32), scale, bias, x.dtype)


def w8a16_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_linear`; x is bfloat16 or float16.

    In bfloat16 the raw sums are rounded once before the scale, where hardware or ATen does the product: bfloat16
    has float32's range, so nothing overflows. float16 has not, and always goes through float32.
    """
    tokens, in_features = x.shape
    packs = in_features % INT8PACK_FEATURES == 0 and qweight.data_ptr() % INT8PACK_ALIGNMENT == 0
    if x.dtype is torch.bfloat16 and tokens <= INT8PACK_MAX_TOKENS and packs:
        one = torch.ones(qweight.shape[0], dtype=x.dtype)
        x = x.contiguous() if x.data_ptr() % INT8PACK_ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)
        y = torch._weight_int8pack_mm(x, qweight, one)
    else:
        fast = x.dtype is torch.bfloat16 and FAST_BF16
        y = _w8_blocks(x, qweight, torch.bfloat16 if fast else torch.float32)
    return _finish(y, scale, bias, x.dtype)


def svdq_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rotate: bool,
    act_bits: int,
    act_zero_point: bool = False,
) -> Tensor:
    """See :func:`qgraft.kernels.reference.svdq_linear`.

    Folded codes are small integers, so their products are exact in float32 and only sums above 2^24 round (1 part
    in 10^7); unlike an int8 instruction without VNNI this never saturates.
    """
    padded = 2 * qweight.shape[1]
    two_level = group_scale is not None
    codes, act_scale, lora_act = reference.svdq_quantize(
        x, smooth_factor, proj_down, padded, group_size, rotate, two_level, act_bits, act_zero_point
    )
    act = codes.float()
    if not two_level:
        act = (act.unflatten(-1, (-1, group_size)) * act_scale[..., None]).flatten(-2)
    out_features = qweight.shape[0]
    y = torch.empty(x.shape[0], out_features, dtype=torch.float32)
    rows = _rows_per_block(x.shape[0], padded, out_features)
    scratch = torch.empty(rows, padded // group_size, group_size, dtype=torch.float32)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        weight, block = unpack_int4(qweight[start:stop]), scratch[: stop - start]
        if two_level:
            block.copy_(reference.fold(weight, group_scale[start:stop], group_size).unflatten(-1, (-1, group_size)))
        else:
            torch.mul(weight.unflatten(-1, (-1, group_size)), scale[start:stop, :, None], out=block)
        weight = block.flatten(-2)
        torch.mm(act, weight.t(), out=y[:, start:stop])
    if two_level:
        y *= act_scale
        y *= scale
    if proj_up is not None:
        y = torch.addmm(y, lora_act, proj_up.float().t())
    if bias is not None:
        y += bias
    return y.to(x.dtype)
