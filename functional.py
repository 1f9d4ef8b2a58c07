"""Quantization as plain functions on tensors: 2 to 8 bits, per tensor, channel, token or group.

    codes, scale, zero_point = quantize_per_channel(weight, bits=8)
    weight_again = dequantize(codes, scale, zero_point)

Everywhere real = scale * (code - zero_point), and

- symmetric: codes in [-(2^(bits-1) - 1), 2^(bits-1) - 1], zero_point 0, scale = absmax / the largest code;
- asymmetric: codes in [-2^(bits-1), 2^(bits-1) - 1], and the range from min to max, widened to hold 0, is spread
  over all of them. 0 is always exact: it is the code zero_point.

Ties round to even, as in torch. Codes are computed by dividing by the float32 scale that is returned, and clamped.
Values below 1e-30 count as 0. The symmetric error is at most scale / 2; the asymmetric one too, except that the ends
of the range, where the zero point's own rounding adds up, may be off by one scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.reference import TINY


class Quantized(NamedTuple):
    """codes int8, of the shape of what was quantized; scale float32 and zero_point int8, of one shape."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def quantize_per_tensor(x: Tensor, bits: int = 8, symmetric: bool = True) -> Quantized:
    """One scale for the whole tensor: x of any shape -> codes of that shape, scale and zero_point 0-dim.

    Raises ValueError for bits outside 2..8, an x that is not floating-point, is empty, or has NaN or infinity.
    """
    x = _checked(x, bits)
    low, high = torch.aminmax(x)
    scale, zero_point = scale_of_range(low, high, bits, symmetric)
    return Quantized(_round(x, scale, zero_point, bits, symmetric), scale, zero_point)


def quantize_per_channel(x: Tensor, bits: int = 8, symmetric: bool = True, axis: int = 0) -> Quantized:
    """One scale for each index of `axis`: a weight (N, K) with axis 0 -> codes (N, K), scale and zero_point (N, 1).

    scale and zero_point have the dimensions of x, all of size 1 but `axis`. Raises ValueError as
    :func:`quantize_per_tensor`, and for an axis that x does not have.
    """
    x = _checked(x, bits)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is none of a tensor of shape {tuple(x.shape)}")
    others = [d for d in range(x.ndim) if d != axis % x.ndim]
    low, high = (x.amin(others, keepdim=True), x.amax(others, keepdim=True)) if others else (x, x)
    scale, zero_point = scale_of_range(low, high, bits, symmetric)
    return Quantized(_round(x, scale, zero_point, bits, symmetric), scale, zero_point)


def quantize_per_token(x: Tensor, bits: int = 8, symmetric: bool = True) -> Quantized:
    """One scale for each vector of the last dimension: (..., K) -> codes (..., K), scale and zero_point (..., 1).

    Raises ValueError as :func:`quantize_per_tensor`.
    """
    return quantize_per_group(x, x.shape[-1] if x.ndim else 1, bits, symmetric)


def quantize_per_group(x: Tensor, group_size: int, bits: int = 8, symmetric: bool = True) -> Quantized:
    """One scale for every `group_size` neighbours: (..., K) -> codes (..., K), scale and zero_point (..., K // G).

    Raises ValueError as :func:`quantize_per_tensor`, and if the groups do not divide K.
    """
    x = _checked(x, bits)
    if x.ndim == 0 or group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"groups of {group_size} do not divide the last dimension of a tensor of {tuple(x.shape)}")
    groups = x.unflatten(-1, (-1, group_size))  # (..., K // G, G)
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    scale, zero_point = scale_of_range(low, high, bits, symmetric)
    codes = _round(groups, scale, zero_point, bits, symmetric).flatten(-2)
    return Quantized(codes, scale.squeeze(-1), zero_point.squeeze(-1))


def absmax_quantize(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale for the whole tensor: x -> (codes int8, what they stand for, in x's dtype).

    Raises ValueError as :func:`quantize_per_tensor`.
    """
    codes, scale, _ = quantize_per_tensor(x, bits)
    return codes, dequantize(codes, scale).to(x.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """scale * (codes - zero_point) in float32: the inverse of every function here.

    codes (..., K) integer; scale and zero_point broadcastable to it, except that their last dimension may also be
    a divisor of K, each entry standing for K / size neighbours. Raises ValueError if it is none.
    """
    values = codes.float()
    if zero_point is not None:
        values = values - _spread(zero_point, codes)
    return values * _spread(scale, codes)


def scale_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and the zero point with which codes of that many bits reach from low to high, and hold 0.

    low <= high, float32 of one shape. Returns scale float32 and zero_point int8 of that shape.
    """
    first, last = code_range(bits, symmetric)
    if symmetric:
        scale = (torch.maximum(high.abs(), low.abs()) / last).clamp_min(TINY)
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high / (last - first) - low / (last - first)).clamp_min(TINY)  # the difference itself may overflow
    return scale, (first - low / scale).round().clamp(first, last).to(torch.int8)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code. Raises ValueError for bits outside 2..8."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    last = 2 ** (bits - 1) - 1
    return (-last if symmetric else -last - 1), last


def _round(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool) -> Tensor:
    return ((x / scale).round() + zero_point).clamp(*code_range(bits, symmetric)).to(torch.int8)


def _checked(x: Tensor, bits: int) -> Tensor:
    """x in float32, fit to be quantized."""
    code_range(bits, True)
    if not x.is_floating_point():
        raise ValueError(f"only floating-point tensors can be quantized, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has nothing to quantize")
    x = x.detach().float()
    if not torch.isfinite(x).all():
        raise ValueError("the tensor has NaN or infinite values, or values beyond float32")
    return x


def _spread(values: Tensor, codes: Tensor) -> Tensor:
    """The scale or zero point of each group, repeated for its members."""
    if values.ndim == 0 or values.shape[-1] in (1, codes.shape[-1]):
        return values
    if codes.shape[-1] % values.shape[-1]:
        raise ValueError(f"{values.shape[-1]} groups do not divide the last dimension of codes {tuple(codes.shape)}")
    return values.repeat_interleave(codes.shape[-1] // values.shape[-1], -1)
