"""The ops on a CPU: the native kernels where they can be had (see `native.py`), else the same in plain torch.

Native kernels read memory by address, so everything about their operands is checked here first.
"""

import torch
from torch import Tensor

from .. import reference
from ..operands import (
    FOLDED_PRODUCT,
    features_in_int32,
    require,
    require_int32_sums,
    require_whole_groups,
    require_zero_points,
)
from . import native, plain

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Sums of products of codes with zero points, at most 255 * 255 each, are kept in 32 bits.
W8A8_MAX_FEATURES = features_in_int32(255**2)
UNIT = 32  # input features that W4A16's kernel takes at a time


def w8a32_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_linear`."""
    return _w8("w8a32_linear", x, qweight, scale, bias, plain.w8a32_linear)


def w8a16_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_linear`; x is bfloat16 or float16.

    Products are exact and summed in float32: by the processor's bfloat16 instructions if it has them and x is
    bfloat16, else in float32.
    """
    return _w8("w8a16_linear", x, qweight, scale, bias, plain.w8a16_linear)


def _w8(op: str, x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, fallback) -> Tensor:
    lib = native.library()
    if lib is None or x.dtype not in TYPES:
        return fallback(x, qweight, scale, bias)
    (m, k), n = x.shape, qweight.shape[0]
    qweight = require(op, x, "qweight", qweight, (torch.int8,), n, k)
    scale = require(op, x, "scale", scale, (torch.float32,), n)
    bias = _bias(op, x, bias, n)
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    act = _activations(x)
    _call(op, lib.qg_w8, *_typed(act), qweight.data_ptr(), scale.data_ptr(), *_typed(bias), *_typed(y), m, n, k)
    return y


def w8a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bias: Tensor | None,
    smooth_factor: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8a8_linear`. A token with NaN in it comes out as NaN."""
    op, lib = "w8a8_linear", native.library()
    (m, k), (n, padded) = x.shape, qweight.shape
    if lib is None or padded > W8A8_MAX_FEATURES or rotation & (rotation - 1) or 0 < rotation < UNIT:
        return reference.w8a8_linear(
            x, qweight, scale, zero_point, act_scale, act_zero_point, bias, smooth_factor, rotation
        )
    require_whole_groups(op, k, padded, rotation)
    qweight = require(op, x, "qweight", qweight, (torch.int8,), n, padded)
    smooth_factor = require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
    scale = require(op, x, "scale", scale, (torch.float32,), n)
    zero_point = require(op, x, "zero_point", zero_point, (torch.int8,), n)
    act_scale = require(op, x, "act_scale", act_scale, (torch.float32,))
    act_zero_point = require(op, x, "act_zero_point", act_zero_point, (torch.int8,))
    bias = _bias(op, x, bias, n)
    y = _output(x, m, n)
    if y.numel():
        zero = 0 if act_zero_point is None or act_scale is None else int(act_zero_point)
        act = _activations(x)
        _call(op, lib.qg_w8a8, *_typed(act), _address(smooth_factor), qweight.data_ptr(), scale.data_ptr(),
              _address(zero_point), _address(act_scale), zero, *_typed(bias), *_typed(y),
              m, n, k, padded, rotation)  # fmt: skip
    return y.to(x.dtype)


def bitnet_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.bitnet_linear`."""
    op, lib = "bitnet_linear", native.library()
    (m, k), n = x.shape, qweight.shape[0]
    if lib is None:
        return reference.bitnet_linear(x, qweight, scale, bias)
    qweight = require(op, x, "qweight", qweight, (torch.uint8,), n, -(-k // 4))
    scale = require(op, x, "scale", scale, (torch.float32,), n)
    bias = _bias(op, x, bias, n)
    y = _output(x, m, n)
    if y.numel():
        act = _activations(x)
        _call(op, lib.qg_bitnet, *_typed(act), qweight.data_ptr(), scale.data_ptr(), *_typed(bias), *_typed(y),
              m, n, k)  # fmt: skip
    return y.to(x.dtype)


def w4a16_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rotate: bool,
) -> Tensor:
    """See :func:`qgraft.kernels.reference.w4a16_linear`.

    On a processor that multiplies bfloat16, activations of that type have the dequantized weight rounded to it too.
    """
    op, lib = "w4a16_linear", native.library()
    (m, k), n, padded = x.shape, qweight.shape[0], 2 * qweight.shape[1]
    if lib is None or x.dtype not in TYPES or group_size % UNIT or (rotate and group_size & (group_size - 1)):
        return reference.w4a16_linear(
            x, qweight, scale, zero_point, smooth_factor, proj_down, proj_up, bias, group_size, rotate
        )
    require_whole_groups(op, k, padded, group_size)
    groups = padded // group_size
    qweight = require(op, x, "qweight", qweight, (torch.uint8,), n, padded // 2)
    scale = require(op, x, "scale", scale, tuple(TYPES), n, groups)
    zero_point = require(op, x, "zero_point", zero_point, (torch.int8,), n, groups)
    smooth_factor = require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
    proj_down, proj_up, rank = _branch(op, x, proj_down, proj_up, k, n)
    bias = _bias(op, x, bias, n)
    y = x.new_empty(m, n)
    if y.numel():
        act = _activations(x)
        _call(op, lib.qg_w4_float, *_typed(act), _address(smooth_factor), *_typed(proj_down), qweight.data_ptr(),
              *_typed(scale), _address(zero_point), *_typed(proj_up), *_typed(bias), *_typed(y),
              m, n, k, padded, group_size, int(rotate), 0, rank)  # fmt: skip
    return y


def svdq_quantize(
    x: Tensor,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    padded: int,
    group_size: int,
    rotate: bool,
    two_level: bool,
    act_bits: int,
    act_zero_point: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`qgraft.kernels.reference.svdq_quantize`. A token with NaN or infinity in it has the scale NaN."""
    op, lib = "svdq_quantize", native.library()
    if lib is None or not _native_groups(group_size, two_level, act_bits):
        return reference.svdq_quantize(
            x, smooth_factor, proj_down, padded, group_size, rotate, two_level, act_bits, act_zero_point
        )
    m, k = x.shape
    require_zero_points(op, act_zero_point, two_level, act_bits)
    require_whole_groups(op, k, padded, group_size)
    smooth_factor = require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
    rank = 0 if proj_down is None else proj_down.shape[1]
    proj_down = require(op, x, "proj_down", proj_down, tuple(TYPES), k, rank)
    codes = x.new_empty(m, padded, dtype=torch.int8)
    act_scale = x.new_empty(m, 1, dtype=torch.float32)
    lora_act = x.new_empty(m, rank, dtype=torch.float32)
    if m:
        act = _activations(x)
        _call(op, lib.qg_svdq_quantize, *_typed(act), _address(smooth_factor), *_typed(proj_down), m, k, padded,
              group_size, int(rotate), act_bits, int(act_zero_point), rank, codes.data_ptr(), act_scale.data_ptr(),
              lora_act.data_ptr())  # fmt: skip
    return codes, act_scale, lora_act


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

    Two-level scales are multiplied as integers; scales that are floats per group in float32, at a third of the speed.
    """
    op, lib = "svdq_linear", native.library()
    (m, k), n, padded = x.shape, qweight.shape[0], 2 * qweight.shape[1]
    two_level = group_scale is not None
    if lib is None or not _native_groups(group_size, True, act_bits) or not (two_level or group_size % UNIT == 0):
        return plain.svdq_linear(
            x, qweight, scale, group_scale, smooth_factor, proj_down, proj_up, bias, group_size, rotate, act_bits,
            act_zero_point,
        )  # fmt: skip
    require_zero_points(op, act_zero_point, two_level, act_bits)
    require_whole_groups(op, k, padded, group_size)
    if two_level:
        require_int32_sums(padded, FOLDED_PRODUCT, op)
    groups = padded // group_size
    qweight = require(op, x, "qweight", qweight, (torch.uint8,), n, padded // 2)
    scale = require(op, x, "scale", scale, (torch.float32,), *((n,) if two_level else (n, groups)))
    group_scale = require(op, x, "group_scale", group_scale, (torch.uint8,), n, groups)
    smooth_factor = require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
    proj_down, proj_up, rank = _branch(op, x, proj_down, proj_up, k, n)
    bias = _bias(op, x, bias, n)
    y = _output(x, m, n)
    if y.numel():
        weight = (qweight.data_ptr(), scale.data_ptr(), group_scale.data_ptr()) if two_level else (
            qweight.data_ptr(), *_typed(scale), None)  # fmt: skip
        act = _activations(x)
        _call(op, lib.qg_svdq if two_level else lib.qg_w4_float, *_typed(act), _address(smooth_factor),
              *_typed(proj_down), *weight, *_typed(proj_up), *_typed(bias), *_typed(y),
              m, n, k, padded, group_size, int(rotate), act_bits, *([int(act_zero_point)] if two_level else []),
              rank)  # fmt: skip
    return y.to(x.dtype)


# ---- operands -------------------------------------------------------------------------------------------------------


def _native_groups(group_size: int, two_level: bool, act_bits: int) -> bool:
    return group_size in (16, 32, 64, 128, 256) and (act_bits == 8 or (act_bits == 4 and two_level))


def _bias(op: str, x: Tensor, bias: Tensor | None, n: int) -> Tensor | None:
    if bias is not None and bias.dtype not in TYPES:
        bias = bias.float()
    return require(op, x, "bias", bias, tuple(TYPES), n)


def _branch(
    op: str, x: Tensor, proj_down: Tensor | None, proj_up: Tensor | None, k: int, n: int
) -> tuple[Tensor | None, Tensor | None, int]:
    if proj_down is None or proj_up is None:
        return None, None, 0
    rank = proj_down.shape[1]
    down = require(op, x, "proj_down", proj_down, tuple(TYPES), k, rank)
    return down, require(op, x, "proj_up", proj_up, tuple(TYPES), n, rank), rank


def _activations(x: Tensor) -> Tensor:
    """x for a kernel that takes any of TYPES. Keep it until the kernel has returned: it may be a copy."""
    return (x if x.dtype in TYPES else x.float()).contiguous()


def _output(x: Tensor, m: int, n: int) -> Tensor:
    return x.new_empty(m, n, dtype=x.dtype if x.dtype in TYPES else torch.float32)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _typed(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), TYPES[tensor.dtype])


def _call(op: str, function, *args) -> None:
    if function(*args):
        raise MemoryError(f"{op}: no memory for the activations")
