"""Codes in 32-bit words, as compressed-tensors and GPTQ pack them: a stream of bits, lowest first, without a sign.

Element i of a row takes bits [i * bits, (i + 1) * bits) of the row's words. With 4 and 8 bits that is the order of the
bytes in memory, so that nothing has to be moved but the sign.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements unpacked at a time where codes straddle words: it takes 16 bytes for each.
CHUNK = 1 << 22


def words(count: int, bits: int) -> int:
    """How many words hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (N, K) with a sign, in [-2^(bits - 1), 2^(bits - 1)) -> (N, words) int32, each code plus 2^(bits - 1)."""
    if bits in (4, 8):
        unsigned = (codes + (1 << bits - 1)).view(torch.uint8)  # wraps to what is meant
        unsigned = F.pad(unsigned, (0, -codes.shape[1] % (32 // bits)))
        return (unsigned if bits == 8 else unsigned[:, 0::2] | unsigned[:, 1::2] << 4).view(torch.int32)
    rows = max(1, CHUNK // codes.shape[1])
    return torch.cat([_straddle(codes[i : i + rows], bits) for i in range(0, len(codes), rows)])


def _straddle(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    unsigned = codes.to(torch.int64) + (1 << bits - 1)
    width = words(k, bits)
    packed = torch.zeros(n, width + 1, dtype=torch.int64, device=codes.device)
    position = torch.arange(k, device=codes.device) * bits
    low = unsigned << position % 32  # at most 39 bits
    # No two codes share a bit, so that adding is the same as or.
    packed.index_add_(1, position // 32, low & 0xFFFFFFFF)
    packed.index_add_(1, position // 32 + 1, low >> 32)
    return packed[:, :width].to(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: (N, words) int32 -> codes (N, count) int8, with a sign."""
    if bits == 8:
        return (packed.view(torch.uint8) ^ 0x80).view(torch.int8)[:, :count].contiguous()
    if bits == 4:
        both = packed.view(torch.uint8)
        unsigned = torch.stack((both & 15, both >> 4), -1).flatten(1)[:, :count]
        return unsigned.view(torch.int8) - 8
    position = torch.arange(count, device=packed.device) * bits
    word, shift = position // 32, position % 32
    rows = max(1, CHUNK // count)
    return torch.cat([_straddling(packed[i : i + rows], word, shift, bits) for i in range(0, len(packed), rows)])


def _straddling(packed: Tensor, word: Tensor, shift: Tensor, bits: int) -> Tensor:
    wide = F.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    both = wide[:, word] | wide[:, word + 1] << 32
    return ((both >> shift & (1 << bits) - 1) - (1 << bits - 1)).to(torch.int8)
