"""What happens to a finished sum: the low-rank branch and the bias are added, and it is stored the other way round."""

import triton
import triton.language as tl

from .common import split_dot


@triton.jit
def add_low_rank(
    y, lora_ptr, up_ptr, rows_m, rows_n, R,
    LORA_TERMS: tl.constexpr, UP_TERMS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y (BLOCK_N, BLOCK_M) float32 + up @ lora_act^T, as good as in float32."""
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        up = tl.load(up_ptr + rows_n[:, None] * R + offs_r[None, :], mask=mask_r[None, :], other=0.0)
        lora = tl.load(lora_ptr + rows_m[None, :] * R + offs_r[:, None], mask=mask_r[:, None], other=0.0)
        y = split_dot(up, lora, y, UP_TERMS, LORA_TERMS)
    return y


@triton.jit
def store_transposed(y, bias_ptr, y_ptr, offs_m, offs_n, M, N):
    """y (BLOCK_N, BLOCK_M) float32 and the bias into the tile of (M, N) at offs_m, offs_n."""
    mask_n = offs_n < N
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[None, :] & mask_n[:, None])
