"""NVFP4 in plain torch: the format, and the product that `gpu/nvfp4.py` is tested against.

A number is four bits, e2m1: a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. Sixteen in a row share a scale of eight bits,
e4m3, and here every row (a token, or an output feature) has one more in float32. The format's usual single scale for
a whole tensor is the case in which all rows have the same. Two codes stand in one byte, the first in the low bits.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import TINY, add_bias

GROUP = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0


def nvfp4_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float rows to NVFP4, every number to the nearest code, ties to the even one.

    x (M, K) float. Returns codes (M, Kp / 2) uint8, group scales (M, Kp / 16) float8_e4m3fn and row scales (M,)
    float32, Kp = K rounded up to a multiple of 16. The row scale maps the largest group scale to 448, the end of e4m3.
    A group under 2^-10 of the smallest step that leaves (1 / 458,752 of the row's largest group) is zero. A row with
    infinity or NaN has a row scale that is not finite.
    """
    x = F.pad(x.float(), (0, -x.shape[1] % GROUP))
    groups = x.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)  # (M, Kp // 16)
    row_scale = (largest.amax(-1) / (E2M1_MAX * E4M3_MAX)).clamp_min(TINY)
    scale = (largest / E2M1_MAX / row_scale[:, None]).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)
    step = scale.float() * row_scale[:, None]
    scaled = torch.where(step[..., None] > 0, groups / step[..., None], 0.0).flatten(1)
    codes = e2m1_codes(scaled)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale, row_scale


def e2m1_codes(x: Tensor) -> Tensor:
    """float32 -> the nearest e2m1, uint8 0..15 (the sign is the eighth), ties to the even code; 6 for all above."""
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for i, (below, above) in enumerate(itertools.pairwise(E2M1)):
        middle = (below + above) / 2  # a tie goes up where the upper code is even
        code += (a >= middle) if i % 2 else (a > middle)
    return code | ((x < 0).to(torch.uint8) << 3)


def nvfp4_dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """Codes (M, Kp / 2) times their group scales (M, Kp / 16), without the row scale: (M, Kp) float32, exact."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1).long()
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    return (table[codes].unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)


def nvfp4_linear(x: Tensor, qweight: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = Q(x) @ weight^T + bias, both sides NVFP4.

    x (M, K) float, quantized here; qweight (N, Kp / 2) uint8, scale (N, Kp / 16) float8_e4m3fn and row_scale (N,)
    float32 as :func:`nvfp4_quantize` makes them of the weight; bias (N,) or None. Returns (M, N) in x's dtype.
    """
    codes, act_scale, act_row_scale = nvfp4_quantize(x)
    y = nvfp4_dequantize(codes, act_scale).double() @ nvfp4_dequantize(qweight, scale).double().t()
    return add_bias(y * act_row_scale[:, None] * row_scale, bias).to(x.dtype)
