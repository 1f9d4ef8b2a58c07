"""Several programs share the sum of one tile of the result.

With few tokens there are fewer tiles than a GPU has multiprocessors, and each would read its weights too slowly. So
the features are split: every program adds up its share and leaves it in a workspace, and whoever comes last (a counter
says) adds the shares in order and writes the result. Nothing is added into the result by several hands, so it is the
same to the bit in every run.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import processors_of

# Programs that one multiprocessor is to have at a time: one computes while the other waits for memory.
RESIDENT = 2
MAX_SPLITS = 16
# A share shorter than this many steps of the loop is over before its pipeline of loads has filled.
MIN_STEPS = 2


# ---- device ---------------------------------------------------------------------------------------------------------


@triton.jit
def share_of(split, splits, features, BLOCK: tl.constexpr):
    """From where to where a split adds: whole blocks, as many for each (the last may have fewer)."""
    each = tl.cdiv(tl.cdiv(features, BLOCK), splits) * BLOCK
    return split * each, min(features, (split + 1) * each)


@triton.jit
def sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(sum of all shares, True) for the last program of the tile to arrive, (anything, False) for the others."""
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    share_ptrs = workspace_ptr + tile.to(tl.int64) * splits * (ROWS * COLUMNS) + offs
    tl.store(share_ptrs + split * (ROWS * COLUMNS), acc)
    tl.debug_barrier()  # one thread counts for all: first, all must have stored
    # Release: whoever sees the count sees the share. Acquire: whoever comes last sees all shares.
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        acc = tl.zeros_like(acc)
        for s in tl.range(0, splits, loop_unroll_factor=4):
            acc += tl.load(share_ptrs + s * (ROWS * COLUMNS), cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)  # for the next launch
    return acc, last


# ---- host -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _splits(tiles: int, steps: int, processors: int) -> int:
    best, best_full = 1, 0.0
    for splits in range(1, min(MAX_SPLITS, steps // MIN_STEPS) + 1):
        rounds = tiles * splits / (RESIDENT * processors)
        full = rounds / -(-tiles * splits // (RESIDENT * processors))  # of the slots that are paid for
        if full > best_full + 0.02:  # more shares mean more traffic: only for a gain
            best, best_full = splits, full
        if full > 0.9:
            break
    return triton.cdiv(steps, triton.cdiv(steps, best))  # no share is empty


def splits_for(x: Tensor, tiles: int, features: int, block: int) -> int:
    """How many programs share a tile, so that all multiprocessors have work and as few as possible wait at the end."""
    return _splits(tiles, triton.cdiv(features, block), processors_of(x))


COUNTERS = 1 << 20
_of_stream: dict[tuple[int, int], Tensor] = {}
_for_graphs: dict[int, tuple[Tensor, int]] = {}


def counters(x: Tensor, tiles: int) -> Tensor:
    """Zeros, int32 (>= tiles,), that every launch leaves as it found them.

    Launches on one stream follow each other and share theirs. A launch that is captured into a graph gets some that
    nobody else has: the graph may be replayed on any stream, next to anything.
    """
    if not x.is_cuda:
        return x.new_zeros(tiles, dtype=torch.int32)
    device = x.device.index
    if torch.cuda.is_current_stream_capturing():
        whole, used = _for_graphs.get(device, (None, COUNTERS))
        if used + tiles <= COUNTERS:
            _for_graphs[device] = whole, used + tiles
            return whole[used : used + tiles]
        return x.new_zeros(tiles, dtype=torch.int32)  # a node of the graph that costs a microsecond in each replay
    if device not in _for_graphs:  # while no graph is captured: memory of a graph would be cleared by its replay only
        _for_graphs[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device), 0
        torch.cuda.current_stream(x.device).synchronize()  # once: replays on other streams must find the zeros
    key = device, torch.cuda.current_stream(x.device).cuda_stream
    have = _of_stream.get(key)
    if have is None or len(have) < tiles:
        have = _of_stream[key] = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=x.device)
    return have


def share_out(
    x: Tensor, m: int, n: int, features: int, tile: dict[str, int], block: int, dtype: torch.dtype
) -> tuple[int, int, Tensor | None, Tensor | None]:
    """For a result (m, n) in tiles BLOCK_M x BLOCK_N, whose sums of type `dtype` run over blocks of the features: how
    many programs to launch, how many of them share a tile, and if that is more than one, their workspace."""
    tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    splits = splits_for(x, tiles, features, block)
    if splits == 1:
        return tiles, 1, None, None
    return tiles * splits, splits, *workspace(x, tiles, splits, tile["BLOCK_M"] * tile["BLOCK_N"], dtype)


def workspace(x: Tensor, tiles: int, splits: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the shares of all tiles of `size` numbers, and the tiles' counters."""
    return x.new_empty(tiles * splits * size, dtype=dtype), counters(x, tiles)
