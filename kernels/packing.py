"""Codes <-> bytes, in the one canonical layout that checkpoints hold: row-major, low nibble first.

Two int4 codes stand in one uint8: byte ``j`` of a row holds code ``2 j`` in its low nibble and code ``2 j + 1``
in its high nibble, both in two's complement. It is the row-major form that vLLM-Omni and comfy-kitchen use for
SVDQuant layers. A device that wants another order derives it at load and never saves it.
"""

import torch
from torch import Tensor


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
