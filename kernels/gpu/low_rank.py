"""The way down of the low-rank branch: a block of tokens times a block of columns of proj_down."""

import triton
import triton.language as tl

from .common import split_dot
from .split_k import share_of, sum_of_shares


@triton.jit
def project_down(
    x_ptr, down_ptr, lora_ptr, workspace_ptr, counter_ptr, pid_m, pid_r, split, splits, M, K, R,
    DOWN_TERMS: tl.constexpr, SPLIT_K: tl.constexpr, LORA_M: tl.constexpr, LORA_K: tl.constexpr, LORA_R: tl.constexpr,
):  # fmt: skip
    offs_m = pid_m * LORA_M + tl.arange(0, LORA_M)
    offs_r = pid_r * LORA_R + tl.arange(0, LORA_R)
    begin, end = 0, K
    if SPLIT_K:
        begin, end = share_of(split, splits, K, LORA_K)
    offs_k = begin + tl.arange(0, LORA_K)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    down_ptrs = down_ptr + offs_k[:, None] * R + offs_r[None, :]

    acc = tl.zeros((LORA_M, LORA_R), dtype=tl.float32)
    for k in range(begin, end, LORA_K):
        x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K + begin - k)[None, :], other=0.0)
        down = tl.load(down_ptrs, mask=(offs_k < K + begin - k)[:, None] & mask_r[None, :], other=0.0)
        if x.dtype == tl.float32:
            acc += split_dot(x, down, tl.zeros((LORA_M, LORA_R), dtype=tl.float32), 3, DOWN_TERMS)
        else:
            acc = tl.dot(x, down.to(x.dtype), acc)
        x_ptrs += LORA_K
        down_ptrs += LORA_K * R

    last = True
    if SPLIT_K:
        tile = pid_m * tl.cdiv(R, LORA_R) + pid_r
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, LORA_M, LORA_R)
    if last:
        lora_ptrs = lora_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(lora_ptrs, acc, mask=mask_m[:, None] & mask_r[None, :])
