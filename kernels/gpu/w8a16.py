"""W8A16: int8 weights, bfloat16 or float16 activations, one kernel for one token and for thousands.

The weight is the first operand of the product (y^T = W x^T): tensor cores take that one from registers, where int8
becomes bfloat16 on the way in. As the second operand it would be converted, written back to shared memory and read
again, which costs more than the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..operands import HALF, require
from . import configs
from .common import FLOATS, has_assembly, launch, target_of, tile_of
from .dequantize import dequantized_int8
from .epilogue import store_transposed
from .split_k import share_of, share_out, sum_of_shares
from .unpack import float16_of_int8


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def w8a16_kernel(
    x_ptr, qweight_ptr, scale_ptr, bias_ptr, y_ptr, workspace_ptr, counter_ptr,
    M, N, K, splits,
    EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    #                K                 BLOCK_M
    #         .-------------.          .---.
    # BLOCK_N |  qweight -->|    K  |  |x^T|        one program: acc (BLOCK_N, BLOCK_M),
    #         '-------------'       v  |   |        stored transposed into y (M, N)
    #                                  '---'
    # With SPLIT_K, `splits` programs in a row share a tile, each with its part of K.
    tile, split, begin, end = tl.program_id(0), 0, 0, K
    if SPLIT_K:
        tile, split = tile // splits, tile % splits
        begin, end = share_of(split, splits, K, BLOCK_K)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = begin + tl.arange(0, BLOCK_K)

    # Rows past the end read the last row again: cheaper than a mask, and never stored.
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[None, :] * K + offs_k[:, None]
    w_ptrs = qweight_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * K + offs_k[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(offs_k < K + begin - k)[None, :], other=0)
            x = tl.load(x_ptrs, mask=(offs_k < K + begin - k)[:, None], other=0.0)
        if x.dtype == tl.float16:
            acc = tl.dot(float16_of_int8(w, ASM), x, acc)
        else:
            acc = tl.dot(w.to(x.dtype), x, acc)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    last = True
    if SPLIT_K:
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, BLOCK_N, BLOCK_M)
    if last:
        y = acc * tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
        store_transposed(y, bias_ptr, y_ptr, offs_m, offs_n, M, N)


def config(m: int, k: int, target: GPUTarget) -> dict[str, int]:
    """Tiles for m tokens. Few tokens: narrow tiles of weights, so that they spread over the whole device."""
    if m <= 16:
        tile = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, num_warps=2, num_stages=4)
    elif m <= 64:
        tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4)
    else:
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=4)
    if k % 16:  # rows that start anywhere are loaded number by number: fewer at a time, or their addresses spill
        tile |= dict(BLOCK_K=32)
    if target.backend == "hip":
        tile |= dict(num_stages=2)
    return tile | dict(GROUP_M=8)


def w8a16_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`qgraft.kernels.reference.w8_linear`; x is bfloat16 or float16.

    From `configs.matmul_from` tokens on, scale * code is rounded to x's type and multiplied by torch.
    """
    op = "w8a16_linear"
    (m, k), n = x.shape, qweight.shape[0]
    x = require(op, x, "x", x, HALF, m, k)
    qweight = require(op, x, "qweight", qweight, (torch.int8,), n, k)
    scale = require(op, x, "scale", scale, (torch.float32,), n)
    bias = require(op, x, "bias", bias, FLOATS, n)
    if m * n == 0:
        return x.new_empty(m, n)
    if m >= configs.matmul_from("w8a16", x):
        weight = dequantized_int8(qweight, scale, x.dtype).t()
        return torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
    target = target_of(x)
    tile = configs.tile("w8a16", x, m, n, k, config, m, k, target)
    y = x.new_empty(m, n)
    programs, splits, shares, counters = share_out(x, m, n, k, tile, tile["BLOCK_K"], torch.float32)
    launch(
        w8a16_kernel, programs, x, qweight, scale, bias, y, shares, counters, m, n, k, splits,
        EVEN_K=k % tile["BLOCK_K"] == 0, SPLIT_K=splits > 1, ASM=has_assembly(target), **tile,
    )  # fmt: skip
    return y
