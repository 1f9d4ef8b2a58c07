"""Weights to 16 bit, for products of so many tokens that unpacking them again for each tile costs more than it saves.

The copy is taken from torch's allocator and goes back to it after the product, so that all layers share one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch
from .unpack import halves_of_words


@triton.jit
def int8_kernel(qweight_ptr, scale_ptr, out_ptr, K, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tl.cdiv(K, BLOCK)).to(tl.int64)
    offs = tl.program_id(0) % tl.cdiv(K, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(qweight_ptr + row * K + offs, mask=offs < K, other=0).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * K + offs, w.to(out_ptr.dtype.element_ty), mask=offs < K)


@triton.jit
def int4_kernel(words_ptr, scale_ptr, zero_ptr, out_ptr, WORDS, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = (tl.program_id(0) // tl.cdiv(WORDS, BLOCK)).to(tl.int64)
    offs = tl.program_id(0) % tl.cdiv(WORDS, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WORDS
    words = tl.load(words_ptr + row * WORDS + offs, mask=mask, other=0)
    scale = tl.load(scale_ptr + row * groups + offs * 4 // GROUP, mask=mask, other=0.0).to(dtype)
    offset = tl.full((BLOCK,), -136.0 if dtype == tl.bfloat16 else -1032.0, dtype)  # see halves_of_words
    if zero_ptr is not None:
        zero = tl.load(zero_ptr + row * groups + offs * 4 // GROUP, mask=mask, other=0)
        offset = (offset.to(tl.float32) - zero.to(tl.float32)).to(dtype)
    q0, q1, q2, q3 = halves_of_words(words, offset, False)
    w = tl.interleave(tl.interleave(q0 * scale, q2 * scale), tl.interleave(q1 * scale, q3 * scale))
    offs = tl.program_id(0) % tl.cdiv(WORDS, BLOCK) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * 4 * WORDS + offs, w, mask=offs < 4 * WORDS)


def dequantized_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * code rounded to a 16-bit dtype, (N, K); qweight (N, K) int8, scale (N,) float32."""
    n, k = qweight.shape
    out = qweight.new_empty(n, k, dtype=dtype)
    launch(int8_kernel, n * triton.cdiv(k, 2048), qweight, scale, out, k, BLOCK=2048, num_warps=4)
    return out


def dequantized_int4(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """scale * (code - zero_point) rounded to a 16-bit dtype, (N, Kp); words (N, Kp / 4) int16, four codes each."""
    n, count = words.shape
    out = words.new_empty(n, 4 * count, dtype=dtype)
    launch(
        int4_kernel, n * triton.cdiv(count, 512), words, scale, zero_point, out, count, scale.shape[1],
        GROUP=group_size, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return out
