"""BitNet: ternary weights times int8 activations.

    y = s_a s_w (sum qa u - sum qa) + bias,   u = code + 1, as it is stored: 0, 1 or 2 in two bits

so that unpacking is a shift and a mask, and the offset comes off once for a token: the sum of its codes is known to
the launch that makes them, W8A8's. The sums are int32, exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..operands import require, require_int32_sums
from . import configs
from .common import FLOATS, has_assembly, launch, target_of, tile_of
from .epilogue import store_transposed
from .split_k import share_of, share_out, sum_of_shares
from .unpack import quarters_of_bytes
from .w8a8 import quantize

PRODUCT = 127 * 3  # at most: 3 is the largest number of two bits


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def bitnet_kernel(
    codes_ptr, qweight_ptr, scale_ptr, steps_ptr, sums_ptr, bias_ptr, y_ptr, workspace_ptr, counter_ptr,
    M, N, QUARTER, splits,
    EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    #          QUARTER = Kp / 4 bytes        BLOCK_M
    #         .----------------------.      .---.  .---.  .---.  .---.
    # BLOCK_N |  qweight (4 codes) -->|  |  | 0 |  | 1 |  | 2 |  | 3 |   every fourth feature of codes^T
    #         '----------------------'   v  |   |  |   |  |   |  |   |
    #                                       '---'  '---'  '---'  '---'
    # acc (BLOCK_N, BLOCK_M) += codes p of the bytes @ plane p, stored transposed into y (M, N)
    tile, split, begin, end = tl.program_id(0), 0, 0, QUARTER
    if SPLIT_K:  # `splits` programs in a row share a tile, each with its part of the bytes
        tile, split = tile // splits, tile % splits
        begin, end = share_of(split, splits, QUARTER, BLOCK_Q)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_q = begin + tl.arange(0, BLOCK_Q)

    # Rows past the end read the last row again: cheaper than a mask, and never stored.
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = qweight_ptr + rows_n[:, None] * QUARTER + offs_q[None, :]
    a_ptrs = codes_ptr + rows_m[None, :] * (4 * QUARTER) + offs_q[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for q in range(begin, end, BLOCK_Q):
        if EVEN_K:
            packed = tl.load(w_ptrs)
            a0 = tl.load(a_ptrs)
            a1 = tl.load(a_ptrs + QUARTER)
            a2 = tl.load(a_ptrs + 2 * QUARTER)
            a3 = tl.load(a_ptrs + 3 * QUARTER)
        else:
            left = offs_q < QUARTER + begin - q
            packed = tl.load(w_ptrs, mask=left[None, :], other=0)
            a0 = tl.load(a_ptrs, mask=left[:, None], other=0)
            a1 = tl.load(a_ptrs + QUARTER, mask=left[:, None], other=0)
            a2 = tl.load(a_ptrs + 2 * QUARTER, mask=left[:, None], other=0)
            a3 = tl.load(a_ptrs + 3 * QUARTER, mask=left[:, None], other=0)
        w0, w1, w2, w3 = quarters_of_bytes(packed, ASM)
        acc = tl.dot(w0, a0, acc, out_dtype=tl.int32)
        acc = tl.dot(w1, a1, acc, out_dtype=tl.int32)
        acc = tl.dot(w2, a2, acc, out_dtype=tl.int32)
        acc = tl.dot(w3, a3, acc, out_dtype=tl.int32)
        w_ptrs += BLOCK_Q
        a_ptrs += BLOCK_Q

    last = True
    if SPLIT_K:
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, BLOCK_N, BLOCK_M)
    if last:
        y = (acc - tl.load(sums_ptr + rows_m)[None, :]).to(tl.float32)
        y = y * tl.load(steps_ptr + rows_m)[None, :] * tl.load(scale_ptr + rows_n)[:, None]
        store_transposed(y, bias_ptr, y_ptr, offs_m, offs_n, M, N)


def config(m: int, quarter: int, target: GPUTarget) -> dict[str, int]:
    """Tiles for m tokens and rows of `quarter` bytes; BLOCK_Q counts bytes, four codes each."""
    if m <= 16:
        tile = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_Q=128, num_warps=4, num_stages=4)
    elif m <= 64:
        tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_Q=64, num_warps=4, num_stages=4)
    else:
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_Q=32, num_warps=8, num_stages=4)
    if quarter % 16:  # rows that start anywhere are loaded byte by byte: fewer at a time, or their addresses spill
        tile |= dict(BLOCK_M=min(tile["BLOCK_M"], 64), BLOCK_N=64, BLOCK_Q=32, num_warps=4)
    if target.backend == "hip":
        tile |= dict(num_stages=2)
    return tile | dict(GROUP_M=8)


def bitnet_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.bitnet_linear`."""
    op = "bitnet_linear"
    (m, k), n = x.shape, qweight.shape[0]
    quarter = triton.cdiv(k, 4)
    x = require(op, x, "x", x, FLOATS, m, k)
    qweight = require(op, x, "qweight", qweight, (torch.uint8,), n, quarter)
    scale = require(op, x, "scale", scale, (torch.float32,), n)
    bias = require(op, x, "bias", bias, FLOATS, n)
    require_int32_sums(k, PRODUCT, op)
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    codes, steps, sums = quantize(x, None, None, planes=4)
    target = target_of(x)
    tile = configs.tile("bitnet", x, m, n, k, config, m, quarter, target)
    programs, splits, shares, counters = share_out(x, m, n, quarter, tile, tile["BLOCK_Q"], torch.int32)
    launch(
        bitnet_kernel, programs, codes, qweight, scale, steps, sums, bias, y, shares, counters,
        m, n, quarter, splits,
        EVEN_K=quarter % tile["BLOCK_Q"] == 0, SPLIT_K=splits > 1, ASM=has_assembly(target), **tile,
    )  # fmt: skip
    return y
