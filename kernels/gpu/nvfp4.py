"""NVFP4 on Blackwell: activations to NVFP4 in one launch, a block-scaled product of both sides in a second one.

The tensor cores take the 4-bit numbers and the scales of their groups as they are; what is left for the end is the
scale of a row of each side. `kernels/nvfp4.py` says what the format is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .. import nvfp4 as reference
from ..operands import require
from ..reference import TINY as SMALLEST
from . import configs
from .common import FLOATS, INTERPRET, ROUNDER, has_tensor_memory, launch, target_of, tile_of
from .epilogue import store_transposed
from .split_k import share_of, share_out, sum_of_shares

E2M1_MAX, E4M3_MAX = tl.constexpr(reference.E2M1_MAX), tl.constexpr(reference.E4M3_MAX)
TINY = tl.constexpr(SMALLEST)


@triton.jit
def e2m1_codes(x):
    """float32 -> the nearest e2m1, int32 0..15, ties to the even code."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code + (x < 0).to(tl.int32) * 8


@triton.jit
def e4m3_of(x):
    """float32 0..448 -> the nearest e4m3, ties to even. Rounded by hand first, so that the conversion is exact: the
    interpreter's own is off where a mantissa carries into the exponent."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^e <= x
    step = tl.maximum(power, 0.015625) * 0.125  # three bits below it, and no less than those of 2^-6
    rounder = step * ROUNDER
    return ((x + rounder) - rounder).to(tl.float8e4nv)


@triton.jit
def nvfp4_quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, row_scale_ptr,
    K, GROUPS,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for k in tl.range(0, K, BLOCK_K, num_stages=1):
        x = tl.load(x_ptr + token * K + k + offs_k, mask=k + offs_k < K, other=0.0).to(tl.float32)
        # |x| as an integer of the same order, in which NaN is above infinity: a maximum that does not lose NaN.
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    row_scale = tl.div_rn(tl.max(largest).to(tl.float32, bitcast=True), E2M1_MAX * E4M3_MAX)
    row_scale = tl.where(row_scale < TINY, TINY, row_scale)
    tl.store(row_scale_ptr + token, row_scale)
    for k in tl.range(0, K, BLOCK_K, num_stages=1):
        x = tl.load(x_ptr + token * K + k + offs_k, mask=k + offs_k < K, other=0.0).to(tl.float32)
        groups = tl.reshape(x, (BLOCK_K // 16, 16))
        scale = tl.div_rn(tl.div_rn(tl.max(tl.abs(groups), axis=1), E2M1_MAX), row_scale)
        scale = e4m3_of(tl.minimum(scale, E4M3_MAX))
        offs_g = k // 16 + tl.arange(0, BLOCK_K // 16)
        tl.store(scale_ptr + token * GROUPS + offs_g, scale, mask=offs_g < GROUPS)
        step = scale.to(tl.float32) * row_scale
        scaled = tl.where((step > 0)[:, None], tl.div_rn(groups, tl.where(step > 0, step, 1.0)[:, None]), 0.0)
        low, high = tl.split(tl.reshape(e2m1_codes(scaled), (BLOCK_K // 2, 2)))
        offs_b = k // 2 + tl.arange(0, BLOCK_K // 2)
        tl.store(codes_ptr + token * GROUPS * 8 + offs_b, (low | (high << 4)).to(tl.uint8), mask=offs_b < GROUPS * 8)


@triton.jit
def _times_scale(codes, scale, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """One e2m1 of every byte, int32 (ROWS, BYTES), times the scale of its group, float32."""
    magnitude = codes & 7
    exponent = magnitude >> 1
    value = tl.where(exponent > 0, (2 + (magnitude & 1)) << tl.maximum(exponent - 1, 0), magnitude & 1)  # halves
    value = tl.where(codes > 7, -value, value).to(tl.float32) * 0.5
    scale = tl.broadcast_to(scale.to(tl.float32)[:, :, None], (ROWS, BYTES // 8, 8))
    return value * tl.reshape(scale, (ROWS, BYTES))


@triton.jit
def _dot_in_float32(w, w_scale, a, a_scale, acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """The block-scaled product in plain Triton, for the interpreter."""
    w, a = w.to(tl.int32), tl.trans(a).to(tl.int32)
    for shift in tl.static_range(0, 8, 4):
        w_half = _times_scale((w >> shift) & 0xF, w_scale, BLOCK_N, BLOCK_B)
        a_half = _times_scale((a >> shift) & 0xF, a_scale, BLOCK_M, BLOCK_B)
        acc = tl.dot(w_half, tl.trans(a_half), acc)
    return acc


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def nvfp4_kernel(
    codes_ptr, act_scale_ptr, act_row_ptr, qweight_ptr, scale_ptr, row_ptr, bias_ptr, y_ptr,
    workspace_ptr, counter_ptr,
    M, N, HALF, GROUPS, splits,
    EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    #          HALF = Kp / 2 bytes       BLOCK_M
    #         .------------------.      .-------.       and one scale for every 8 bytes of either side
    # BLOCK_N |  qweight      -->|   |  |codes^T|
    #         '------------------'   v  |       |       acc (BLOCK_N, BLOCK_M) float32,
    #                                   '-------'       stored transposed into y (M, N)
    tile, split, begin, end = tl.program_id(0), 0, 0, HALF
    if SPLIT_K:  # `splits` programs in a row share a tile, each with its part of the bytes
        tile, split = tile // splits, tile % splits
        begin, end = share_of(split, splits, HALF, BLOCK_B)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = begin + tl.arange(0, BLOCK_B)
    offs_g = begin // 8 + tl.arange(0, BLOCK_B // 8)

    # Rows past the end read the last row again: cheaper than a mask, and never stored.
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = qweight_ptr + rows_n[:, None] * HALF + offs_b[None, :]
    a_ptrs = codes_ptr + rows_m[None, :] * HALF + offs_b[:, None]
    w_scale_ptrs = scale_ptr + rows_n[:, None] * GROUPS + offs_g[None, :]
    a_scale_ptrs = act_scale_ptr + rows_m[:, None] * GROUPS + offs_g[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for b in range(begin, end, BLOCK_B):
        if EVEN_K:
            w, w_scale = tl.load(w_ptrs), tl.load(w_scale_ptrs)
            a, a_scale = tl.load(a_ptrs), tl.load(a_scale_ptrs)
        else:
            left_b, left_g = offs_b < HALF + begin - b, (offs_g < GROUPS + (begin - b) // 8)[None, :]
            w, w_scale = tl.load(w_ptrs, mask=left_b[None, :], other=0), tl.load(w_scale_ptrs, mask=left_g, other=0.0)
            a, a_scale = tl.load(a_ptrs, mask=left_b[:, None], other=0), tl.load(a_scale_ptrs, mask=left_g, other=0.0)
        if NATIVE:
            acc = tl.dot_scaled(w, w_scale, "e2m1", a, a_scale, "e2m1", acc)
        else:
            acc = _dot_in_float32(w, w_scale, a, a_scale, acc, BLOCK_N, BLOCK_M, BLOCK_B)
        w_ptrs += BLOCK_B
        a_ptrs += BLOCK_B
        w_scale_ptrs += BLOCK_B // 8
        a_scale_ptrs += BLOCK_B // 8

    last = True
    if SPLIT_K:
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, BLOCK_N, BLOCK_M)
    if last:
        y = acc * tl.load(act_row_ptr + rows_m)[None, :] * tl.load(row_ptr + rows_n)[:, None]
        store_transposed(y, bias_ptr, y_ptr, offs_m, offs_n, M, N)


def has_nvfp4(target: GPUTarget) -> bool:
    """Whether the tensor cores multiply NVFP4: Blackwell, of data centers (sm_10x) and of desktops (sm_12x)."""
    return target.backend == "cuda" and target.arch // 10 in (10, 12)


def config(m: int, half: int, target: GPUTarget) -> dict[str, int]:
    """Tiles for m tokens and rows of `half` bytes; BLOCK_B counts bytes, two codes each.

    BLOCK_N is 128 throughout: fewer rows a block-scaled product does not take on data-center Blackwell.
    """
    if m <= 64:
        tile = dict(BLOCK_M=16 if m <= 16 else 64, BLOCK_N=128, BLOCK_B=128, num_warps=4, num_stages=4)
    else:
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_B=128, num_warps=8, num_stages=3)
    if not has_tensor_memory(target):  # the sum is in registers, and 99 KiB is all that a program can have
        tile |= dict(BLOCK_B=64, num_warps=8, num_stages=3)
    if half % 16:  # rows that start anywhere are loaded byte by byte: fewer at a time, or their addresses spill
        tile |= dict(BLOCK_M=min(tile["BLOCK_M"], 32), BLOCK_B=tile["BLOCK_B"] // 2, num_warps=8, num_stages=3)
    return tile | dict(GROUP_M=8)


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`qgraft.kernels.nvfp4.nvfp4_quantize`. Raises RuntimeError on a GPU without NVFP4."""
    target = target_of(x)
    if not (INTERPRET or has_nvfp4(target)):
        raise RuntimeError(
            f"NVFP4 needs the tensor cores of Blackwell (sm_100, sm_120), and this GPU is {_name(target)}; "
            "for four bits here take w4a8_svd or w4a16"
        )
    x = require("nvfp4_linear", x, "x", x, FLOATS, *x.shape)
    m, k = x.shape
    groups = triton.cdiv(k, reference.GROUP)
    codes = x.new_empty(m, groups * 8, dtype=torch.uint8)
    scale = x.new_empty(m, groups, dtype=torch.float8_e4m3fn)
    row_scale = x.new_empty(m, dtype=torch.float32)
    if m:
        block = min(2048, max(256, triton.next_power_of_2(k)))
        launch(
            nvfp4_quantize_kernel, m, x, codes, scale, row_scale, k, groups,
            BLOCK_K=block, num_warps=block // 256,  # with more numbers a thread, registers spill
        )  # fmt: skip
    return codes, scale, row_scale


def _name(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def nvfp4_linear(x: Tensor, qweight: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.nvfp4.nvfp4_linear`. Raises RuntimeError on a GPU without NVFP4."""
    op = "nvfp4_linear"
    (m, k), n = x.shape, qweight.shape[0]
    groups = triton.cdiv(k, reference.GROUP)
    half = 8 * groups
    qweight = require(op, x, "qweight", qweight, (torch.uint8,), n, half)
    scale = require(op, x, "scale", scale, (torch.float8_e4m3fn,), n, groups)
    row_scale = require(op, x, "row_scale", row_scale, (torch.float32,), n)
    bias = require(op, x, "bias", bias, FLOATS, n)
    codes, act_scale, act_row_scale = quantize(x)
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    tile = configs.tile("nvfp4", x, m, n, k, config, m, half, target_of(x))
    programs, splits, shares, counters = share_out(x, m, n, half, tile, tile["BLOCK_B"], torch.float32)
    launch(
        nvfp4_kernel, programs, codes, act_scale, act_row_scale, qweight, scale, row_scale, bias, y,
        shares, counters, m, n, half, groups, splits,
        EVEN_K=half % tile["BLOCK_B"] == 0, SPLIT_K=splits > 1, NATIVE=not INTERPRET, **tile,
    )  # fmt: skip
    return y
