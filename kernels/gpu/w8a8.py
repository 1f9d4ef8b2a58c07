"""W8A8: activations to int8 in one launch, int8 times int8 in a second one.

    y = s_a s_w (sum (qa - za) qw  -  zw sum (qa - za)) + bias

Both inner sums are int32, exact. The sum over a token comes from the first launch, where the codes are in registers.
What za takes from the sum over a weight row, za sum qw, is found on the way: one more product, with ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .. import reference
from ..operands import require, require_int32_sums, require_whole_groups
from . import configs
from .common import FLOATS, ROUNDER, launch, target_of, tile_of
from .epilogue import store_transposed
from .split_k import share_of, share_out, sum_of_shares
from .svdq_quantize import quantize as quantize_rotated
from .svdq_quantize import smooth_and_rotate

INT8_MAX = tl.constexpr(float(reference.INT8_MAX))
TINY = tl.constexpr(reference.TINY)
# The largest product of two codes, and of one and the 255 that another can be away from its zero point.
PRODUCT, PRODUCT_ZERO = 128 * 128, 128 * 255


@triton.jit
def w8a8_quantize_kernel(
    x_ptr, act_scale_ptr, act_zero_ptr, codes_ptr, steps_ptr, sums_ptr,
    K, PLANE,
    PLANES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    if act_scale_ptr is None:
        largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
        for k in tl.range(0, K, BLOCK_K, num_stages=1):
            x = tl.load(x_ptr + token * K + k + offs_k, mask=k + offs_k < K, other=0.0).to(tl.float32)
            # |x| as an integer of the same order, in which NaN is above infinity: a maximum that does not lose NaN.
            largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        step = tl.div_rn(tl.max(largest).to(tl.float32, bitcast=True), INT8_MAX)
        step = tl.where(step < TINY, TINY, step)
        tl.store(steps_ptr + token, step)
    else:
        step = tl.load(act_scale_ptr)
    zero = 0.0
    spoiled = tl.zeros((BLOCK_K,), dtype=tl.int32)
    lowest = -INT8_MAX
    if act_scale_ptr is not None:
        lowest = -INT8_MAX - 1
        if act_zero_ptr is not None:
            zero = tl.load(act_zero_ptr).to(tl.float32)
    total = tl.zeros((BLOCK_K,), dtype=tl.int32)
    STEP: tl.constexpr = BLOCK_K // PLANES
    plane_ptrs = codes_ptr + token * PLANES * PLANE + offs_k // STEP * PLANE
    for k in tl.range(0, K, BLOCK_K, num_stages=1):
        mask = k + offs_k < K
        x = tl.load(x_ptr + token * K + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        spoiled |= (x != x).to(tl.int32)
        codes = (tl.div_rn(x, step) + ROUNDER) - ROUNDER + zero  # to the nearest, ties to even
        codes = tl.where(codes == codes, tl.minimum(tl.maximum(codes, lowest), INT8_MAX), zero)  # NaN has no code
        total += tl.where(mask, (codes - zero).to(tl.int32), 0)
        codes = codes.to(tl.int8)
        if PLANES > 1:
            codes = tl.reshape(tl.trans(tl.reshape(codes, (STEP, PLANES))), (BLOCK_K,))
        offs = k // PLANES + offs_k % STEP
        tl.store(plane_ptrs + offs, codes, mask=offs < PLANE)
    tl.store(sums_ptr + token, tl.sum(total))
    if act_scale_ptr is not None:  # a token with NaN in it has the scale NaN, as a largest magnitude would be
        tl.store(steps_ptr + token, tl.where(tl.max(spoiled) > 0, float("nan"), step))


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def w8a8_kernel(
    codes_ptr, qweight_ptr, scale_ptr, zero_ptr, steps_ptr, act_zero_ptr, sums_ptr, bias_ptr, y_ptr,
    workspace_ptr, counter_ptr,
    M, N, K, splits,
    EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    #                K                 BLOCK_M
    #         .-------------.          .-------.
    # BLOCK_N |  qweight -->|    K  |  |codes^T|        one program: acc (BLOCK_N, BLOCK_M) int32,
    #         '-------------'       v  |       |        stored transposed into y (M, N)
    #                                  '-------'
    tile, split, begin, end = tl.program_id(0), 0, 0, K
    if SPLIT_K:  # `splits` programs in a row share a tile, each with its part of K
        tile, split = tile // splits, tile % splits
        begin, end = share_of(split, splits, K, BLOCK_K)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = begin + tl.arange(0, BLOCK_K)

    # Rows past the end read the last row again: cheaper than a mask, and never stored.
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    a_ptrs = codes_ptr + rows_m[None, :] * K + offs_k[:, None]
    w_ptrs = qweight_ptr + rows_n[:, None] * K + offs_k[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    row_sums = tl.zeros((BLOCK_N, 16), dtype=tl.int32)  # 16 times the same: the tensor cores take no less
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            a = tl.load(a_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K + begin - k)[None, :], other=0)
            a = tl.load(a_ptrs, mask=(offs_k < K + begin - k)[:, None], other=0)
        acc = tl.dot(w, a, acc, out_dtype=tl.int32)
        if act_zero_ptr is not None:
            row_sums = tl.dot(w, tl.full((BLOCK_K, 16), 1, tl.int8), row_sums, out_dtype=tl.int32)
        w_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    if act_zero_ptr is not None:
        acc -= (tl.max(row_sums, axis=1) * tl.load(act_zero_ptr).to(tl.int32))[:, None]

    last = True
    if SPLIT_K:
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, BLOCK_N, BLOCK_M)
    if last:
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + rows_n).to(tl.int64)
            y = (acc - zero[:, None] * tl.load(sums_ptr + rows_m)[None, :]).to(tl.float32)
        else:
            y = acc.to(tl.float32)
        y *= tl.load(steps_ptr + rows_m)[None, :]
        y *= tl.load(scale_ptr + rows_n)[:, None]
        store_transposed(y, bias_ptr, y_ptr, offs_m, offs_n, M, N)


def config(m: int, k: int, target: GPUTarget) -> dict[str, int]:
    """Tiles for m tokens. Few tokens: narrow tiles of weights, so that they spread over the whole device."""
    if m <= 16:
        tile = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=256, num_warps=4, num_stages=4)
    elif m <= 64:
        tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4)
    else:
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=3)
    if k % 16:  # rows that start anywhere are loaded number by number: fewer at a time, or their addresses spill
        tile |= dict(BLOCK_M=min(tile["BLOCK_M"], 64), BLOCK_N=min(tile["BLOCK_N"], 64), BLOCK_K=32)
        tile |= dict(num_warps=min(tile["num_warps"], 4))
    if target.backend == "hip":
        tile |= dict(num_stages=2)
    return tile | dict(GROUP_M=8)


def quantize(
    x: Tensor, act_scale: Tensor | None, act_zero_point: Tensor | None, planes: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qgraft.kernels.reference.w8a8_quantize`, and the sums of codes less their zero point, (M,) int32.

    With `planes` P the codes are (M, P ceil(K / P)), every P-th feature together: those of features p, P + p, .. stand
    from p ceil(K / P) on. A kernel whose weights come P to a byte reads each plane in one piece. Missing features have
    the code 0.
    """
    m, k = x.shape
    plane = triton.cdiv(k, planes)
    codes = x.new_empty(m, planes * plane, dtype=torch.int8)
    steps = x.new_empty(m, dtype=torch.float32)
    sums = x.new_empty(m, dtype=torch.int32)
    block = min(4096, max(256, triton.next_power_of_2(k)))
    launch(
        w8a8_quantize_kernel, m, x, act_scale, act_zero_point, codes, steps, sums, k, plane,
        PLANES=planes, BLOCK_K=block, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return codes, steps, sums


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
    """See :func:`qgraft.kernels.reference.w8a8_linear`."""
    op = "w8a8_linear"
    m, (n, k) = x.shape[0], qweight.shape
    x = require(op, x, "x", x, FLOATS, m, x.shape[1])
    require_whole_groups(op, x.shape[1], k, rotation)
    qweight = require(op, x, "qweight", qweight, (torch.int8,), n, k)
    scale = require(op, x, "scale", scale, (torch.float32,), n)
    zero_point = require(op, x, "zero_point", zero_point, (torch.int8,), n)
    act_scale = require(op, x, "act_scale", act_scale, (torch.float32,))
    act_zero_point = require(op, x, "act_zero_point", act_zero_point, (torch.int8,)) if act_scale is not None else None
    bias = require(op, x, "bias", bias, FLOATS, n)
    require_int32_sums(k, PRODUCT if act_zero_point is None else PRODUCT_ZERO, op)
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    if rotation and act_scale is None and zero_point is None:  # in one launch; nothing then needs the sums
        codes, steps, _ = quantize_rotated(x, smooth_factor, None, k, rotation, True, False, 8, False, planes=False)
        sums = None
    else:
        if rotation:
            x, _ = smooth_and_rotate(x.float(), smooth_factor, None, k, rotation, True, planes=1)
        elif smooth_factor is not None:
            x = x.float() / require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
        codes, steps, sums = quantize(x, act_scale, act_zero_point)
    tile = configs.tile("w8a8", x, m, n, k, config, m, k, target_of(x))
    programs, splits, shares, counters = share_out(x, m, n, k, tile, tile["BLOCK_K"], torch.int32)
    launch(
        w8a8_kernel, programs, codes, qweight, scale, zero_point, steps, act_zero_point, sums, bias, y,
        shares, counters, m, n, k, splits,
        EVEN_K=k % tile["BLOCK_K"] == 0, SPLIT_K=splits > 1, **tile,
    )  # fmt: skip
    return y
