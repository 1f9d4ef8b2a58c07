"""int4 weights times int8 activations in Triton, in two steps. It runs without a GPU:

TRITON_INTERPRET=1 python docs/examples/triton_w4a8.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def nibbles(packed):
    """The two int4 codes of every byte, int32: even features (low nibbles) and odd ones."""
    packed = packed.to(tl.int32)
    return ((packed & 0xF) ^ 8) - 8, ((packed >> 4) ^ 8) - 8


@triton.jit
def grouped_kernel(
    even_ptr, odd_ptr, act_scale_ptr, qweight_ptr, scale_ptr, y_ptr, M, N, HALF,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A float scale for every group of every row: a step of the loop is a group, GROUP / 2 = BLOCK_B bytes."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = tl.arange(0, BLOCK_B)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for b in range(0, HALF, BLOCK_B):
        packed = tl.load(qweight_ptr + offs_n[:, None] * HALF + b + offs_b[None, :], mask=mask_n[:, None], other=0)
        even = tl.load(even_ptr + offs_m[None, :] * HALF + b + offs_b[:, None], mask=mask_m[None, :], other=0)
        odd = tl.load(odd_ptr + offs_m[None, :] * HALF + b + offs_b[:, None], mask=mask_m[None, :], other=0)
        low, high = nibbles(packed)
        part = tl.dot(low.to(tl.int8), even, out_dtype=tl.int32)
        part = tl.dot(high.to(tl.int8), odd, part, out_dtype=tl.int32)
        scale = tl.load(scale_ptr + offs_n * (2 * HALF // GROUP) + 2 * b // GROUP, mask=mask_n, other=0.0)
        acc += part.to(tl.float32) * scale[:, None]  # BLOCK_N x BLOCK_M conversions and products, for every group
    y = acc * tl.load(act_scale_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
    y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


@triton.jit
def w4a8_kernel(
    even_ptr, odd_ptr, act_scale_ptr, lora_ptr, qweight_ptr, scale_ptr, group_scale_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, HALF,
    GROUP: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A float for the row, an integer 1..16 and a zero point for the group. The branch and the bias at the end."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = tl.arange(0, BLOCK_B)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for b in range(0, HALF, BLOCK_B):
        packed = tl.load(qweight_ptr + offs_n[:, None] * HALF + b + offs_b[None, :], mask=mask_n[:, None], other=0)
        even = tl.load(even_ptr + offs_m[None, :] * HALF + b + offs_b[:, None], mask=mask_m[None, :], other=0)
        odd = tl.load(odd_ptr + offs_m[None, :] * HALF + b + offs_b[:, None], mask=mask_m[None, :], other=0)
        low, high = nibbles(packed)
        byte = tl.load(group_scale_ptr + offs_n * (2 * HALF // GROUP) + 2 * b // GROUP, mask=mask_n, other=0)
        integer, zero_point = (byte.to(tl.int32) & 15) + 1, (byte.to(tl.int32) >> 4) - 8
        low = (low - zero_point[:, None]) * integer[:, None]  # still an int8
        high = (high - zero_point[:, None]) * integer[:, None]
        acc = tl.dot(low.to(tl.int8), even, acc, out_dtype=tl.int32)
        acc = tl.dot(high.to(tl.int8), odd, acc, out_dtype=tl.int32)

    # The epilogue: floats, once.
    y = acc.to(tl.float32) * tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y *= tl.load(act_scale_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
    offs_r = tl.arange(0, RANK)
    up = tl.load(up_ptr + offs_n[:, None] * RANK + offs_r[None, :], mask=mask_n[:, None], other=0.0)
    lora = tl.load(lora_ptr + offs_m[None, :] * RANK + offs_r[:, None], mask=mask_m[None, :], other=0.0)
    y = tl.dot(up.to(tl.float32), lora, y)
    y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y_ptrs = y_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


def planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes (M, K) int8 -> the even and the odd features, (M, K // 2) each: what the two nibbles of a byte meet."""
    return codes[:, 0::2].contiguous(), codes[:, 1::2].contiguous()


def grouped(codes: Tensor, act_scale: Tensor, qweight: Tensor, scale: Tensor, group: int) -> Tensor:
    """codes (M, K) int8, act_scale (M, 1), qweight (N, K // 2) uint8, scale (N, K // group) -> y (M, N) float32."""
    (m, k), n = codes.shape, qweight.shape[0]
    y = torch.empty(m, n, device=codes.device)
    tile = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_B=group // 2)
    grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))
    grouped_kernel[grid](*planes(codes), act_scale, qweight, scale, y, m, n, k // 2, GROUP=group, **tile)
    return y


def w4a8(
    codes: Tensor, act_scale: Tensor, lora: Tensor, qweight: Tensor, scale: Tensor, group_scale: Tensor, up: Tensor,
    bias: Tensor, group: int,
) -> Tensor:  # fmt: skip
    """As `grouped`; scale (N,), group_scale (N, K // group) uint8, lora (M, R) and up (N, R) the branch, bias (N,)."""
    (m, k), (n, rank) = codes.shape, up.shape
    y = torch.empty(m, n, device=codes.device)
    tile = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_B=group // 2)
    grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))
    w4a8_kernel[grid](
        *planes(codes), act_scale, lora, qweight, scale, group_scale, up, bias, y, m, n, k // 2,
        GROUP=group, RANK=rank, **tile,
    )  # fmt: skip
    return y


if __name__ == "__main__":
    from qgraft import SVDQW4A8Linear
    from qgraft.kernels import reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for m, n, k in ((1, 64, 64), (37, 70, 192), (64, 96, 320)):
        linear, x = torch.nn.Linear(k, n, device=device), torch.randn(m, k, device=device)
        exact = linear(x).double()
        for scales in ("group", "two_level"):
            layer = SVDQW4A8Linear.from_linear(linear, rank=16, scales=scales)
            codes, act_scale, lora = reference.svdq_quantize(
                x, layer.smooth_factor, layer.proj_down, k, 64, True, scales == "two_level", 8
            )
            bias, up = layer.bias.data, layer.proj_up.float()
            meant = reference.svdq_gemm(
                codes, act_scale, lora, layer.qweight, layer.scale, layer.group_scale, up, bias, 64, torch.float64
            )
            if scales == "group":
                y = grouped(codes, act_scale, layer.qweight, layer.scale, 64) + lora @ up.t() + bias
            else:
                y = w4a8(codes, act_scale, lora, layer.qweight, layer.scale, layer.group_scale, up, bias, 64)
            kernel, rounding = (y - meant).norm() / meant.norm(), (meant - exact).norm() / exact.norm()
            print(f"{m:2} x {n} x {k:3}, {scales:9}: {kernel:.1e} by the kernel, {rounding:.1e} by the codes")
            assert kernel < 2e-3 and rounding < 0.2  # float32 products on a GPU may be TF32
