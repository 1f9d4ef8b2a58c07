"""A first matrix product in Triton, and the same with int8 weights. It runs without a GPU:

TRITON_INTERPRET=1 python docs/examples/triton_matmul.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def matmul_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    # Which tile of y is this program's?
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offs_k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)

    # Addresses of the first block of x and of w: row times the length of a row, plus column.
    x_ptrs = x_ptr + offs_m[:, None] * K + offs_k[None, :]  # (BLOCK_M, BLOCK_K)
    w_ptrs = w_ptr + offs_n[None, :] * K + offs_k[:, None]  # (BLOCK_K, BLOCK_N): w is (N, K), read turned

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = offs_k < K - k
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_n < N)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K), w (N, K), both contiguous and of one float type -> x w^T (M, N) in that type."""
    (m, k), n = x.shape, w.shape[0]
    y = x.new_empty(m, n)
    tile = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
    grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))
    matmul_kernel[grid](x, w, y, m, n, k, **tile)
    return y


@triton.jit
def matmul_int8_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :] * K + offs_k[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = offs_k < K - k
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_n < N)[None, :] & inside[:, None], other=0)
        acc = tl.dot(x, w.to(x.dtype), acc)  # 1. codes become floats in registers
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)
    y = acc * scale[None, :]  # 2. the scale of a row comes once, after the sum
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def matmul_int8(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """x (M, K) float, qweight (N, K) int8, scale (N,) float32 -> x (scale * qweight)^T (M, N) in x's type."""
    (m, k), n = x.shape, qweight.shape[0]
    y = x.new_empty(m, n)
    tile = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
    grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))
    matmul_int8_kernel[grid](x, qweight, scale, y, m, n, k, **tile)
    return y


if __name__ == "__main__":
    from qgraft.layers.algorithms.rounding import quantize_rows_int8

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for m, n, k in ((1, 64, 64), (37, 70, 129), (64, 96, 256)):
        x, w = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
        exact = x.double() @ w.double().t()
        error = (matmul(x, w) - exact).norm() / exact.norm()

        qweight, scale = quantize_rows_int8(w)
        meant = x.double() @ (qweight.double() * scale.double()[:, None]).t()
        kernel = (matmul_int8(x, qweight, scale) - meant).norm() / meant.norm()
        rounding = (meant - exact).norm() / exact.norm()
        print(f"{m:3} x {n:3} x {k:3}: float {error:.1e}, int8 {kernel:.1e} by the kernel, {rounding:.1e} by the codes")
        assert error < 2e-3 and kernel < 2e-3 and rounding < 2e-2  # float32 products on a GPU may be TF32
