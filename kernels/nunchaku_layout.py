"""Row-major tensors <-> the tiles that nunchaku's int4 kernels read: codes, scales, vectors and low-rank factors.

nunchaku stores every tensor in the order in which the 32 lanes of a warp load the operands of ``mma.m16n8k64``
(int4) and ``mma.m16n8k16`` (16 bit), so that a load is one contiguous 16 bytes a lane. Each function here is one
reshape and one permutation, and its inverse. The layout was published with DeepCompressor and nunchaku
(``MmaWeightPacker``, Apache-2.0); PTX calls the fragments "matrix B of m16n8k64" and "accumulators".

Read a table as: an index of a row-major axis is split into digits, slowest first, and the digits of all axes are
written down in the order `to`. What each digit is:

    a, b  which tile            t, s  which 16 rows of it          h, c  which half of a fragment
    r     row lane, 8 of them   q     column lane, 4 of them       e, p  which element of a register
"""

import torch
from torch import Tensor

from .packing import pack_int4, unpack_int4

# A block of the kernel is 128 rows; it takes two steps of 64 columns at a time.
TILE = 128
GROUP = 64
# The low-rank factors come in fragments of 16 x 16.
RANK_TILE = 16


def tile_codes(codes: Tensor) -> Tensor:
    """int4 codes (N, K) int8 in [-8, 7], N and K multiples of 128 -> (N, K // 2) int8 in tiles.

    n = a t h r, k = b c q e  ->  a b t r q h c e, two codes a byte, low nibble first.
    """
    n, k = codes.shape
    tiles = codes.reshape(n // TILE, 8, 2, 8, k // GROUP, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7)
    return pack_int4(tiles.reshape(n, k)).view(torch.int8)


def untile_codes(tiles: Tensor) -> Tensor:
    """The inverse of :func:`tile_codes`: (N, K // 2) int8 -> (N, K) int8 in [-8, 7]."""
    n, k = tiles.shape[0], 2 * tiles.shape[1]
    codes = unpack_int4(tiles.contiguous().view(torch.uint8))
    return codes.reshape(n // TILE, k // GROUP, 8, 8, 4, 2, 2, 8).permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)


def tile_scales(scales: Tensor) -> Tensor:
    """Scales of groups (N, G), N a multiple of 128 -> (G, N) in tiles, any dtype.

    n = a s h q p, g  ->  a g s q h p. (G, N) is only the shape: the tiles of 128 rows stay the slowest.
    """
    n, groups = scales.shape
    return scales.reshape(n // TILE, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4).reshape(groups, n)


def untile_scales(tiles: Tensor) -> Tensor:
    """The inverse of :func:`tile_scales`: (G, N) -> (N, G)."""
    groups, n = tiles.shape
    return tiles.reshape(n // TILE, groups, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, groups)


def tile_vector(vector: Tensor) -> Tensor:
    """A bias (N,) or a smooth_factor (K,), its length a multiple of 128: as one group of scales."""
    return tile_scales(vector[:, None])[0]


def untile_vector(tiles: Tensor) -> Tensor:
    """The inverse of :func:`tile_vector`."""
    return untile_scales(tiles[None])[:, 0]


def tile_up(proj_up: Tensor) -> Tensor:
    """The up-projection (N, R), both multiples of 16 -> (N, R) in tiles.

    n = a h r, rank = b c q e  ->  a b r q h c e.
    """
    n, rank = proj_up.shape
    tiles = proj_up.reshape(n // RANK_TILE, 2, 8, rank // RANK_TILE, 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 1, 4, 6).reshape(n, rank)


def untile_up(tiles: Tensor) -> Tensor:
    """The inverse of :func:`tile_up`."""
    n, rank = tiles.shape
    split = tiles.reshape(n // RANK_TILE, rank // RANK_TILE, 8, 4, 2, 2, 2)
    return split.permute(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)


def tile_down(proj_down: Tensor) -> Tensor:
    """The down-projection (K, R), both multiples of 16 -> (K, R) in tiles.

    Here the rank is on the row lanes: rank = b h r, k = a c q e  ->  a b r q h c e.
    """
    k, rank = proj_down.shape
    tiles = proj_down.reshape(k // RANK_TILE, 2, 4, 2, rank // RANK_TILE, 2, 8)
    return tiles.permute(0, 4, 6, 2, 5, 1, 3).reshape(k, rank)


def untile_down(tiles: Tensor) -> Tensor:
    """The inverse of :func:`tile_down`."""
    k, rank = tiles.shape
    split = tiles.reshape(k // RANK_TILE, rank // RANK_TILE, 8, 4, 2, 2, 2)
    return split.permute(0, 5, 3, 6, 1, 4, 2).reshape(k, rank)
