"""Codes <-> bytes, in the one canonical layout that checkpoints hold: row-major, lowest bits first.

Two int4 codes stand in one uint8: byte ``j`` of a row holds code ``2 j`` in its low nibble and code ``2 j + 1``
in its high nibble, both in two's complement. It is the row-major form that vLLM-Omni and comfy-kitchen use for
SVDQuant layers. Four ternary codes stand in one uint8: byte ``j`` of a row holds codes ``4 j`` to ``4 j + 3``, two
bits each from the lowest up, stored as code + 1. The integer and the zero point of a group of int4 codes stand in one
uint8. A device that wants another order derives it at load and never saves it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int4 codes two to a byte.

    codes: (..., K) int8 with values in [-8, 7], K even. Returns (..., K // 2) uint8.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_int4 needs an even last dimension, got {codes.shape[-1]}")
    pairs = codes.to(torch.int8).view(torch.uint8) & 0xF
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: (..., K // 2) uint8 -> (..., K) int8 in [-8, 7]."""
    as_int8 = packed.view(torch.int8)
    low = (as_int8 << 4) >> 4  # the arithmetic shift back spreads the sign
    high = as_int8 >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack ternary codes four to a byte, each as code + 1 in two bits.

    codes: (..., K) with values -1, 0 and 1, any K >= 1; rows are padded with the code 0 to whole bytes.
    Returns (..., ceil(K / 4)) uint8. Raises ValueError for any other code.
    """
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"ternary codes are -1, 0 and 1, got {codes.min().item()} to {codes.max().item()}")
    quads = F.pad(codes.to(torch.int8), (0, -codes.shape[-1] % 4)).add_(1).view(torch.uint8).unflatten(-1, (-1, 4))
    return quads[..., 0] | (quads[..., 1] << 2) | (quads[..., 2] << 4) | (quads[..., 3] << 6)


def unpack_ternary(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_ternary`, padding included: (..., Kp / 4) uint8 -> (..., Kp) int8 in -1, 0, 1."""
    quads = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return quads.flatten(-2).view(torch.int8) - 1


# The byte of integer 1 and zero point 0.
NO_GROUP = 0x80


def pack_group_scale(integer: Tensor, zero_point: Tensor) -> Tensor:
    """The integer of a group of int4 codes, 1..16, and its zero point, -8..7, in a byte: integer - 1 in the low four
    bits, zero point + 8 in the high ones. Any shape and integer type; returns uint8.

    A group stands for integer * (code - zero_point), which must be an int8 for each of its 16 codes.
    """
    return (integer.to(torch.uint8) - 1) | ((zero_point.to(torch.int8) + 8).view(torch.uint8) << 4)


def unpack_group_scale(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_group_scale`: uint8 -> (integer, zero_point), int8."""
    packed = packed.view(torch.int8)
    return (packed & 15) + 1, ((packed >> 4) & 15) - 8
