"""SVDQ, first half: activations to codes, and down to the rank of the branch, in one launch.

Two kinds of programs stand in one grid. Most take one token each: smooth, rotate, find the scales, write the codes.
The others take a block of tokens and project it down; of few tokens several share the features (see `split_k`). A
block's projections come just before its tokens, so that x comes from main memory once and from the second-level cache
the other times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .. import reference
from ..operands import require, require_whole_groups, require_zero_points
from .common import FLOATS, ROUNDER, TERMS, has_tensor_memory, launch, target_of
from .low_rank import project_down
from .rotation import rotate_groups
from .split_k import splits_for, workspace

INT4_MAX = tl.constexpr(float(reference.INT4_MAX))
ACT_STEPS = tl.constexpr(reference.ACT_STEPS)
ACT_SPAN = tl.constexpr(reference.ACT_SPAN)
INT8_MAX = tl.constexpr(float(reference.INT8_MAX))
MAX_GROUP_SCALE = tl.constexpr(float(reference.MAX_GROUP_SCALE))
TINY = tl.constexpr(reference.TINY)


@triton.jit
def divide(x, y):
    """x / y as IEEE division rounds it (but for one case in a million), at the price of a fast reciprocal: many x share
    a y here, and the remainder corrects the quotient."""
    inverse = 1.0 / y
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def load_groups(
    x_row, smooth_ptr, offs_k, K,
    BLOCK_G: tl.constexpr, GROUP: tl.constexpr, ROTATE: tl.constexpr, X_TERMS: tl.constexpr,
):  # fmt: skip
    """A tile of one token as it will be quantized, float32 (BLOCK_G, GROUP), zeros past the end."""
    x = tl.load(x_row + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    if smooth_ptr is not None:
        x = divide(x, tl.load(smooth_ptr + offs_k, mask=offs_k < K, other=1.0))
    if ROTATE:
        x = rotate_groups(x, BLOCK_G, GROUP, X_TERMS)
    return x


@triton.jit
def magnitude(x):
    """|x| as an integer of the same order, in which NaN is above infinity: a maximum that does not lose NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def step_of(absmax, STEPS: tl.constexpr):
    """The scale with which the `magnitude` absmax takes STEPS steps; never 0, and NaN for NaN."""
    scale = divide(absmax.to(tl.float32, bitcast=True), STEPS)
    return tl.where(scale < TINY, TINY, scale)


@triton.jit
def nearest(x, scale):
    """x / scale to the nearest integer, ties to even as torch.round; float32."""
    return (divide(x, scale) + ROUNDER) - ROUNDER


@triton.jit
def round_to(x, scale, LIMIT: tl.constexpr):
    """The same within +-LIMIT."""
    return tl.minimum(tl.maximum(nearest(x, scale), -LIMIT), LIMIT)


@triton.jit
def quantize_token(
    x_ptr, smooth_ptr, codes_ptr, scale_ptr, token, K, padded,
    GROUP: tl.constexpr, ROTATE: tl.constexpr, TWO_LEVEL: tl.constexpr, ACT_BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr, PLANES: tl.constexpr, X_TERMS: tl.constexpr, BLOCK_G: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    """The codes of one token and its scales; with ACT_BITS 16 the smoothed and rotated numbers themselves."""
    BLOCK_K: tl.constexpr = BLOCK_G * GROUP
    offs_g = tl.arange(0, BLOCK_G)
    offs_k = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (BLOCK_G, GROUP)
    groups = padded // GROUP
    x_row = x_ptr + token.to(tl.int64) * K
    codes_row = codes_ptr + token.to(tl.int64) * padded

    # A scale of the whole token has to be known before its first code. A row of one tile stays in registers; a longer
    # one is read twice.
    if ONE_TILE:
        x = load_groups(x_row, smooth_ptr, offs_k, K, BLOCK_G, GROUP, ROTATE, X_TERMS)
    if ACT_BITS == 8 or (TWO_LEVEL and ACT_BITS == 4):
        largest = tl.zeros((BLOCK_G,), dtype=tl.int32)
        if ONE_TILE:
            largest = tl.maximum(largest, tl.max(magnitude(x), axis=1))
        else:
            for k in tl.range(0, padded, BLOCK_K, num_stages=1):
                x = load_groups(x_row, smooth_ptr, k + offs_k, K, BLOCK_G, GROUP, ROTATE, X_TERMS)
                largest = tl.maximum(largest, tl.max(magnitude(x), axis=1))
        # (The maximum of all, not along axis 0: Triton 3.7 fails on sm_100 at two reductions in a row.)
        token_scale = step_of(tl.max(largest), INT8_MAX if ACT_BITS == 8 else ACT_STEPS * MAX_GROUP_SCALE)
        tl.store(scale_ptr + token, token_scale)

    for k in tl.range(0, padded, BLOCK_K, num_stages=1):
        if not ONE_TILE:
            x = load_groups(x_row, smooth_ptr, k + offs_k, K, BLOCK_G, GROUP, ROTATE, X_TERMS)
        if ACT_BITS == 16:
            codes = x
        elif ACT_BITS == 8:
            codes = round_to(x, token_scale, INT8_MAX)
        else:
            if ZERO_POINT:
                largest_f, least_f = tl.max(x, axis=1), tl.min(x, axis=1)  # (BLOCK_G,)
                span = largest_f - least_f
                integer = tl.maximum(round_to(span, token_scale * ACT_SPAN, MAX_GROUP_SCALE), 1.0)
                step = integer * token_scale
                first = (divide(largest_f + least_f, 2 * step) - 7.5 + ROUNDER) - ROUNDER
                codes = nearest(x, step[:, None])
                codes = tl.minimum(tl.maximum(codes, first[:, None]), first[:, None] + 15) * integer[:, None]
            elif TWO_LEVEL:
                absmax_f = tl.max(magnitude(x), axis=1).to(tl.float32, bitcast=True)
                integer = tl.maximum(round_to(absmax_f, token_scale * ACT_STEPS, MAX_GROUP_SCALE), 1.0)
                codes = round_to(x, (integer * token_scale)[:, None], INT4_MAX) * integer[:, None]
            else:
                scale = step_of(tl.max(magnitude(x), axis=1), INT4_MAX)
                scale_ptrs = scale_ptr + token.to(tl.int64) * groups + k // GROUP + offs_g
                tl.store(scale_ptrs, scale, mask=k // GROUP + offs_g < groups)
                codes = round_to(x, scale[:, None], INT4_MAX)
        codes = codes.to(codes_ptr.dtype.element_ty)
        if PLANES == 4:
            even, odd = tl.split(tl.reshape(codes, (BLOCK_G, GROUP // 2, 2)))
            c0, c2 = tl.split(tl.reshape(even, (BLOCK_G, GROUP // 4, 2)))
            c1, c3 = tl.split(tl.reshape(odd, (BLOCK_G, GROUP // 4, 2)))
            offs_j = k // 4 + offs_g[:, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]
            mask_j = offs_j < padded // 4
            tl.store(codes_row + offs_j, c0, mask=mask_j)
            tl.store(codes_row + padded // 4 + offs_j, c1, mask=mask_j)
            tl.store(codes_row + padded // 2 + offs_j, c2, mask=mask_j)
            tl.store(codes_row + padded // 4 * 3 + offs_j, c3, mask=mask_j)
        elif PLANES == 2:
            even, odd = tl.split(tl.reshape(codes, (BLOCK_G, GROUP // 2, 2)))
            offs_j = k // 2 + offs_g[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
            tl.store(codes_row + offs_j, even, mask=offs_j < padded // 2)
            tl.store(codes_row + padded // 2 + offs_j, odd, mask=offs_j < padded // 2)
        else:
            tl.store(codes_row + k + offs_k, codes, mask=k + offs_k < padded)


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def svdq_quantize_kernel(
    x_ptr, smooth_ptr, down_ptr, codes_ptr, scale_ptr, lora_ptr, workspace_ptr, counter_ptr,
    M, K, padded, R, splits,
    GROUP: tl.constexpr, ROTATE: tl.constexpr, TWO_LEVEL: tl.constexpr, ACT_BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr, PLANES: tl.constexpr, X_TERMS: tl.constexpr, DOWN_TERMS: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_G: tl.constexpr, ONE_TILE: tl.constexpr,
    LORA_M: tl.constexpr, LORA_K: tl.constexpr, LORA_R: tl.constexpr,
):  # fmt: skip
    # The programs of one block of LORA_M tokens, one after the other, with `projections` = ceil(R / LORA_R) * splits:
    #
    #   | project down | ... | token 0 | token 1 | ... | token LORA_M - 1 |   next block ...
    #     LORA_R ranks         all features, a tile of BLOCK_G groups at a time
    projections = 0
    if down_ptr is not None:
        projections = tl.cdiv(R, LORA_R) * splits
    tokens: tl.constexpr = 0 if codes_ptr is None else LORA_M
    block = tl.program_id(0) // (projections + tokens)
    member = tl.program_id(0) % (projections + tokens)
    token = block * LORA_M + member - projections
    if member >= projections:
        if codes_ptr is not None:  # noqa: SIM102 (known to the compiler, unlike the next)
            if token < M:
                quantize_token(
                    x_ptr, smooth_ptr, codes_ptr, scale_ptr, token, K, padded,
                    GROUP, ROTATE, TWO_LEVEL, ACT_BITS, ZERO_POINT, PLANES, X_TERMS, BLOCK_G, ONE_TILE,
                )  # fmt: skip
    elif down_ptr is not None:
        project_down(
            x_ptr, down_ptr, lora_ptr, workspace_ptr, counter_ptr, block, member // splits, member % splits, splits,
            M, K, R, DOWN_TERMS, SPLIT_K, LORA_M, LORA_K, LORA_R,
        )  # fmt: skip


def config(k: int, padded: int, rank: int, group_size: int, dtype: torch.dtype, target: GPUTarget) -> dict[str, int]:
    """Tiles of one token, so many features that every warp rotates rows of its own: 16 rows of a group, up to 64."""
    features = 4096 if padded > 2048 else 2048
    num_warps = min(8, features // (16 * min(group_size, 64)))
    if has_tensor_memory(target):  # four warps would rotate there, far away for so little work
        features, num_warps = 2048, 2
    lora_k = 32 if dtype == torch.float32 else 128  # twice the bytes, and three terms of each
    if k % 16 or rank % 16:  # rows that start anywhere are loaded number by number
        lora_k = 32
    if has_tensor_memory(target) and lora_k == 32:  # or two warps spill
        lora_k = 16
    return dict(
        BLOCK_G=features // group_size,
        ONE_TILE=padded <= features,
        LORA_M=16,
        LORA_K=lora_k,
        LORA_R=32,
        num_warps=num_warps,
        num_stages=2 if target.backend == "hip" else 3,
    )


def quantize(
    x: Tensor,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    padded: int,
    group_size: int,
    rotate: bool,
    two_level: bool,
    act_bits: int,
    act_zero_point: bool,
    planes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qgraft.kernels.reference.svdq_quantize`, and with `planes` the codes of a row as all even features and
    then all odd ones, which is how the nibbles of the packed weight come apart."""
    op = "svdq_quantize"
    m, k = x.shape
    rank = 0 if proj_down is None else proj_down.shape[1]
    if group_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"{op}: group_size must be 16, 32, 64, 128 or 256, got {group_size}")
    if act_bits not in (4, 8):
        raise ValueError(f"{op}: act_bits must be 4 or 8, got {act_bits}")
    require_zero_points(op, act_zero_point, two_level, act_bits)
    require_whole_groups(op, k, padded, group_size)
    x = require(op, x, "x", x, FLOATS, m, k)
    smooth_factor = require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
    proj_down = require(op, x, "proj_down", proj_down, FLOATS, k, rank)
    proj_down = proj_down if rank else None

    codes = x.new_empty(m, padded, dtype=torch.int8)
    scales = 1 if two_level or act_bits == 8 else padded // group_size
    scale = x.new_empty(m, scales, dtype=torch.float32)
    lora_act = x.new_empty(m, rank, dtype=torch.float32)
    if m == 0:
        return codes, scale, lora_act
    planes_of_codes = 2 if planes else 1
    scale_terms = dict(TWO_LEVEL=two_level, ACT_BITS=act_bits, ZERO_POINT=act_zero_point, PLANES=planes_of_codes)
    _launch(x, smooth_factor, proj_down, codes, scale, lora_act, padded, group_size, rotate, scale_terms)
    return codes, scale, lora_act


def smooth_and_rotate(
    x: Tensor,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    padded: int,
    group_size: int,
    rotate: bool,
    planes: int,
) -> tuple[Tensor, Tensor]:
    """The activations of layers that do not quantize them: x' = rotate_groups(pad(x / smooth_factor)), (M, padded) in
    x's dtype, and lora_act = x @ proj_down, (M, R) float32. One launch, or none if there is nothing to do.

    With 4 planes the numbers of a row stand as 0, 4, 8.., then 1, 5, 9.. and so on; with 1 in their order.
    """
    op = "w4a16_linear"
    m, k = x.shape
    rank = 0 if proj_down is None else proj_down.shape[1]
    smooth_factor = require(op, x, "smooth_factor", smooth_factor, (torch.float32,), k)
    proj_down = require(op, x, "proj_down", proj_down, FLOATS, k, rank)
    proj_down = proj_down if rank else None
    lora_act = x.new_empty(m, rank, dtype=torch.float32)
    if rotate and group_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"{op}: with rotation group_size must be 16, 32, 64, 128 or 256, got {group_size}")
    changed = None
    if smooth_factor is not None or rotate or padded != k or planes > 1:
        changed = x.new_empty(m, padded)
    if not rotate:  # the groups mean nothing then, but for the shape of a tile
        group_size = 16
    if changed is not None or proj_down is not None:
        modes = dict(TWO_LEVEL=False, ACT_BITS=16, ZERO_POINT=False, PLANES=planes)
        _launch(x, smooth_factor, proj_down, changed, None, lora_act, padded, group_size, rotate, modes)
    return x if changed is None else changed, lora_act


def _launch(
    x: Tensor,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    lora_act: Tensor,
    padded: int,
    group_size: int,
    rotate: bool,
    modes: dict[str, int],
) -> None:
    (m, k), rank = x.shape, lora_act.shape[1]
    tile = config(k, padded, rank, group_size, x.dtype, target_of(x))
    blocks, ranks = triton.cdiv(m, tile["LORA_M"]), triton.cdiv(rank, tile["LORA_R"])
    splits, shares, counters = 1, None, None
    if rank:
        splits = splits_for(x, blocks * ranks, k, tile["LORA_K"])
    if splits > 1:
        shares, counters = workspace(x, blocks * ranks, splits, tile["LORA_M"] * tile["LORA_R"], torch.float32)
    launch(
        svdq_quantize_kernel, blocks * (ranks * splits + (0 if codes is None else tile["LORA_M"])),
        x, smooth_factor, proj_down, codes, scale, lora_act, shares, counters, m, k, padded, rank, splits,
        GROUP=group_size, ROTATE=rotate, X_TERMS=TERMS[x.dtype] if smooth_factor is None else 3,
        DOWN_TERMS=1 if proj_down is None else TERMS[proj_down.dtype], SPLIT_K=splits > 1,
        **modes, **tile,
    )  # fmt: skip
