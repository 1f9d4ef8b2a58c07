"""SVDQ, second half: int4 weights times the codes of the activations, plus the low-rank branch, in one launch.

The packed weight is the first operand of the product (y^T = W x^T), so its nibbles become int8 in registers on the
way into the tensor cores. The low nibbles of a row are the even features and the high ones the odd ones, and the
activations come as two planes to match: two products, and no weight changes its place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..operands import FOLDED_PRODUCT, require, require_int32_sums
from . import configs
from .common import FLOATS, TERMS, has_assembly, launch, target_of, tile_of
from .epilogue import add_low_rank, store_transposed
from .split_k import share_of, share_out, sum_of_shares
from .unpack import folded_int8, int8_times_16


@triton.jit
def load_pieces(row_ptrs, b, groups, GROUP: tl.constexpr, PIECES: tl.constexpr, EACH: tl.constexpr):
    """One value for every EACH bytes of a tile that starts at byte b: that of their group, (rows, PIECES)."""
    group = (b + tl.arange(0, PIECES) * EACH) * 2 // GROUP
    return tl.load(row_ptrs + group[None, :], mask=(group < groups)[None, :], other=0)


@triton.jit
def spread_pieces(values, ROWS: tl.constexpr, PIECES: tl.constexpr, EACH: tl.constexpr):
    """(ROWS, PIECES) -> (ROWS, PIECES * EACH)."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (ROWS, PIECES, EACH)), (ROWS, PIECES * EACH))


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def svdq_gemm_kernel(
    codes_ptr, act_scale_ptr, lora_ptr, qweight_ptr, scale_ptr, group_scale_ptr, up_ptr, bias_ptr, y_ptr,
    workspace_ptr, counter_ptr,
    M, N, HALF, R, splits,
    GROUP: tl.constexpr, ACT_GROUPS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, ASM: tl.constexpr,
    LORA_TERMS: tl.constexpr, UP_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    #            HALF = Kp / 2 bytes         BLOCK_M
    #         .----------------------.      .---.           .---.
    # BLOCK_N |  qweight (2 codes) -->|  |  |   | even      |   | odd features of codes^T
    #         '----------------------'   v  |   |           |   |
    #                                       '---'           '---'
    # acc (BLOCK_N, BLOCK_M) += low nibbles @ even + high nibbles @ odd, stored transposed into y (M, N)
    TWO_LEVEL: tl.constexpr = group_scale_ptr is not None
    # With SPLIT_K, `splits` programs in a row share a tile, each with its part of the bytes.
    tile, split, begin, end = tl.program_id(0), 0, 0, HALF
    if SPLIT_K:
        tile, split = tile // splits, tile % splits
        begin, end = share_of(split, splits, HALF, BLOCK_B)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = begin + tl.arange(0, BLOCK_B)

    # Rows past the end read the last row again: cheaper than a mask, and never stored.
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = qweight_ptr + rows_n[:, None] * HALF + offs_b[None, :]
    even_ptrs = codes_ptr + rows_m[None, :] * (2 * HALF) + offs_b[:, None]
    odd_ptrs = even_ptrs + HALF

    groups = HALF * 2 // GROUP
    if TWO_LEVEL:
        # The integers of a tile are too few bytes for the pipeline's asynchronous copies, so they are fetched one
        # step ahead by hand. In pieces of half a tile or less: a single one makes the compiler send the weights
        # through shared memory.
        EACH: tl.constexpr = min(GROUP // 2, BLOCK_B // 2)
        PIECES: tl.constexpr = BLOCK_B // EACH
        integer_rows = group_scale_ptr + rows_n[:, None] * groups
        next_integer = load_pieces(integer_rows, begin, groups, GROUP, PIECES, EACH)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)  # exact, see `require_int32_sums`
    else:
        BYTES: tl.constexpr = min(GROUP // 2, BLOCK_B)  # of one group in a tile
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    for b in range(begin, end, BLOCK_B):
        if EVEN_K:
            packed = tl.load(w_ptrs)
            even = tl.load(even_ptrs)
            odd = tl.load(odd_ptrs)
        else:
            packed = tl.load(w_ptrs, mask=(offs_b < HALF + begin - b)[None, :], other=0)
            even = tl.load(even_ptrs, mask=(offs_b < HALF + begin - b)[:, None], other=0)
            odd = tl.load(odd_ptrs, mask=(offs_b < HALF + begin - b)[:, None], other=0)
        if TWO_LEVEL:
            # In the byte of a group: its integer - 1, and above that its zero point + 8.
            integer = (next_integer.to(tl.int32) & 15) + 1
            zero = spread_pieces(integer * (next_integer.to(tl.int32) >> 4), BLOCK_N, PIECES, EACH)
            integer = spread_pieces(integer, BLOCK_N, PIECES, EACH)
            next_integer = load_pieces(integer_rows, b + BLOCK_B, groups, GROUP, PIECES, EACH)
            low, high = folded_int8(packed, integer, zero, ASM)
            acc = tl.dot(low, even, acc, out_dtype=tl.int32)
            acc = tl.dot(high, odd, acc, out_dtype=tl.int32)
        else:
            low, high = int8_times_16(packed, ASM)
            for g in tl.static_range(BLOCK_B // BYTES):
                group = b * 2 // GROUP + g
                step = tl.load(scale_ptr + rows_n * groups + group, mask=group < groups, other=0.0)[:, None]
                if ACT_GROUPS:
                    act_step = tl.load(act_scale_ptr + rows_m * groups + group, mask=group < groups, other=0.0)
                    step = step * act_step[None, :]
                low_g, high_g = low, high
                if BLOCK_B > BYTES:  # too short for the tensor cores alone: its neighbours count as zero
                    low_g = tl.where(((offs_b - begin) // BYTES == g)[None, :], low, 0)
                    high_g = tl.where(((offs_b - begin) // BYTES == g)[None, :], high, 0)
                part = tl.dot(low_g, even, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32), out_dtype=tl.int32)
                part = tl.dot(high_g, odd, part, out_dtype=tl.int32)
                acc += part.to(tl.float32) * (step * 0.0625)
        w_ptrs += BLOCK_B
        even_ptrs += BLOCK_B
        odd_ptrs += BLOCK_B

    last = True
    if SPLIT_K:
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, BLOCK_N, BLOCK_M)
    if last:
        y = acc.to(tl.float32)
        if not ACT_GROUPS:
            y *= tl.load(act_scale_ptr + rows_m)[None, :]
        if TWO_LEVEL:
            y *= tl.load(scale_ptr + rows_n)[:, None]
        if up_ptr is not None:
            y = add_low_rank(y, lora_ptr, up_ptr, rows_m, rows_n, R, LORA_TERMS, UP_TERMS, BLOCK_R)
        store_transposed(y, bias_ptr, y_ptr, offs_m, offs_n, M, N)


def config(
    m: int, half: int, group_size: int, two_level: bool, out_dtype: torch.dtype, target: GPUTarget
) -> dict[str, int]:
    """Tiles for m tokens and rows of `half` bytes; BLOCK_B counts bytes, two codes each."""
    if m <= 16:
        tile = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_B=128, num_warps=2, num_stages=4)
    elif m <= 64 or not two_level or half % 16:
        tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_B=64, num_warps=4, num_stages=4)
    elif target.arch == 90 or target.backend == "hip":
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_B=64, num_warps=8, num_stages=4)
    else:  # with an accumulator of 128 x 128 the rest does not fit in the registers
        tile = dict(BLOCK_M=64, BLOCK_N=128, BLOCK_B=64, num_warps=8, num_stages=3)
    if not two_level:  # one group at a time, but never less than the tensor cores take
        tile["BLOCK_B"] = min(tile["BLOCK_B"], max(32, group_size // 2))
        if group_size == 16:  # four groups in flight, and the registers of four
            tile["BLOCK_M"] = min(tile["BLOCK_M"], 32)
    if half % 16:  # rows that start anywhere are loaded byte by byte: fewer at a time, or their addresses spill
        tile["BLOCK_B"] = 32
        if not two_level:
            tile["BLOCK_M"] = 16
    if target.backend == "hip":
        tile["num_stages"] = 2
    tile["BLOCK_R"] = 16 if out_dtype == torch.float32 else 32
    return tile | dict(GROUP_M=8)


def gemm(
    codes: Tensor,
    act_scale: Tensor,
    lora_act: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`qgraft.kernels.reference.svdq_gemm` for codes in planes, see :func:`.svdq_quantize.quantize`."""
    op = "svdq_linear"
    (m, padded), n = codes.shape, qweight.shape[0]
    groups, rank = padded // group_size, lora_act.shape[1]
    two_level = group_scale is not None
    qweight = require(op, codes, "qweight", qweight, (torch.uint8,), n, padded // 2)
    scale = require(op, codes, "scale", scale, (torch.float32,), *((n,) if two_level else (n, groups)))
    group_scale = require(op, codes, "group_scale", group_scale, (torch.uint8,), n, groups)
    proj_up = require(op, codes, "proj_up", proj_up, FLOATS, n, rank)
    proj_up = proj_up if rank else None
    bias = require(op, codes, "bias", bias, FLOATS, n)
    if two_level:
        require_int32_sums(padded, FOLDED_PRODUCT, op)
    y = codes.new_empty(m, n, dtype=out_dtype)
    if y.numel() == 0:
        return y
    half, target = padded // 2, target_of(codes)
    kind = "svdq_two_level" if two_level else "svdq_groups"
    tile = configs.tile(kind, codes, m, n, padded, config, m, half, group_size, two_level, out_dtype, target)
    sums = torch.int32 if two_level else torch.float32
    programs, splits, shares, counters = share_out(codes, m, n, half, tile, tile["BLOCK_B"], sums)
    launch(
        svdq_gemm_kernel, programs, codes, act_scale, lora_act, qweight, scale, group_scale, proj_up, bias, y,
        shares, counters, m, n, half, rank, splits,
        GROUP=group_size, ACT_GROUPS=act_scale.shape[1] > 1, EVEN_K=half % tile["BLOCK_B"] == 0,
        SPLIT_K=splits > 1, ASM=has_assembly(target) and half % 16 == 0,
        LORA_TERMS=3 if out_dtype == torch.float32 else 2,
        UP_TERMS=1 if proj_up is None else TERMS[proj_up.dtype],
        **tile,
    )  # fmt: skip
    return y
