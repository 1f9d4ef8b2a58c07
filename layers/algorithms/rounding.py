"""From a float weight to codes and scales: rounding to nearest, with searched steps.

Every function divides by the very scale that is stored, in float32, and clamps. Leaving out either is how a bfloat16
scale, rounded down, turns the largest weight of a row into code 128, which an int8 wraps to -128.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...functional import quantize_per_channel, scale_of_range
from ...kernels.reference import INT4_MAX, INT8_MAX, MAX_GROUP_SCALE, TINY

# Steps tried for a row of int8 codes, as a share of absmax / 127. Clipping gains nothing at 8 bits; what does is the
# step at which most weights happen to fall near a code.
INT8_GRID = (1.0, *(0.97 + 0.005 * i for i in range(13) if i != 6))
# Steps tried for a group, as a share of absmax / 7: clipping the largest weights a little makes all others finer.
CLIP_GRID = tuple(0.64 + 0.04 * i for i in range(10))
# The share that most groups take: for a first look, where a search would take long.
CLIP = 0.8
# The same for a group with a zero point, as a share of its range, which fits more closely to begin with.
RANGE_GRID = tuple(1.0 - 0.04 * i for i in range(10))
RANGE_CLIP = 0.95
# Rows searched at once, so that the float copies stay small beside the weight itself.
CHUNK_ELEMENTS = 1 << 19


def quantize_rows_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale a row: the one near absmax / 127 with the least squared error.

    weight (N, K) float -> codes (N, K) int8 in [-127, 127], scale (N,) float32.
    """
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n, dtype=torch.float32, device=weight.device)
    for rows in row_chunks(n, k):
        part = weight[rows].float()
        top = (part.abs().amax(1) / INT8_MAX).clamp_min(TINY)  # (rows,)
        candidates = [top * ratio for ratio in INT8_GRID]
        errors = torch.stack([_int8_error(part, step) for step in candidates])  # (candidates, rows)
        step = torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]
        scale[rows] = step
        codes[rows] = _round_int8(part, step).to(torch.int8)
    return codes, scale


def quantize_rows_int8_affine(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 with one scale and one zero point a row, from its least to its greatest weight; weight ~ s (code - z).

    weight (N, K) float -> codes (N, K) int8, scale (N,) float32, zero_point (N,) int8.
    """
    n, k = weight.shape
    parts = [quantize_per_channel(weight[rows], symmetric=False) for rows in row_chunks(n, k)]
    codes, scale, zero_point = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scale.squeeze(1), zero_point.squeeze(1)


def _round_int8(weight: Tensor, step: Tensor) -> Tensor:
    return (weight / step[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)


def _int8_error(weight: Tensor, step: Tensor) -> Tensor:
    return _round_int8(weight, step).mul_(step[:, None]).sub_(weight).square_().sum(1)


def round_int4(weight: Tensor, step: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Nearest int4 codes: weight, step and zero_point broadcastable -> float codes in [-8, 7]."""
    codes = (weight / step).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(-INT4_MAX - 1, INT4_MAX)


def round_to_groups(weight: Tensor, group_size: int, zero_point: bool = False) -> Tensor:
    """weight (N, Kp) float32 as int4 codes hold it, roughly: rounded to nearest with steps that are not searched."""
    rounded = torch.empty_like(weight)
    for rows in row_chunks(*weight.shape):
        groups = weight[rows].unflatten(1, (-1, group_size))  # (rows, Kp // G, G)
        if zero_point:
            low, high = torch.aminmax(groups, dim=-1, keepdim=True)
            step, zero = scale_of_range(low * RANGE_CLIP, high * RANGE_CLIP, 4, symmetric=False)
            rounded[rows] = round_int4(groups, step, zero).sub_(zero).mul_(step).flatten(1)
        else:
            step = (groups.abs().amax(-1, keepdim=True) * (CLIP / INT4_MAX)).clamp_min(TINY)
            rounded[rows] = round_int4(groups, step).mul_(step).flatten(1)
    return rounded


def search_group_steps(weight: Tensor, group_size: int) -> Tensor:
    """The step of each group with the least squared rounding error. weight (N, Kp) -> (N, Kp // G) float32."""
    n, k = weight.shape
    best = torch.empty(n, k // group_size, dtype=torch.float32, device=weight.device)
    for rows in row_chunks(n, k):
        groups = weight[rows].float().unflatten(1, (-1, group_size))  # (rows, Kp // G, G)
        top = (groups.abs().amax(-1) / INT4_MAX).clamp_min(TINY)
        best[rows] = _least_error((_error(groups, step), step) for step in (top * ratio for ratio in CLIP_GRID))[0]
    return best


def search_group_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The step and the zero point of each group with the least squared rounding error; weight ~ step (code - zero).

    weight (N, Kp) -> steps (N, Kp // G) float32, zero_point (N, Kp // G) int8 in [-8, 7].
    """
    n, k = weight.shape
    steps = torch.empty(n, k // group_size, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(n, k // group_size, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(n, k):
        groups = weight[rows].float().unflatten(1, (-1, group_size))  # (rows, Kp // G, G)
        low, high = torch.aminmax(groups, dim=-1)
        ranges = (scale_of_range(low * ratio, high * ratio, 4, symmetric=False) for ratio in RANGE_GRID)
        steps[rows], zeros[rows] = _least_error((_error(groups, *pair), *pair) for pair in ranges)
    return steps, zeros


def two_level_scales(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """One float a row times a small integer a group, the form whose whole K loop is one int8 product.

    weight (N, Kp) -> scale (N,) float32, integer (N, Kp // G) int8 in 1..16; the step of a group is their
    product. The row's float comes from its largest searched group step; each group then takes the integer with the
    least squared error among those around its own searched step.
    """
    steps = search_group_steps(weight, group_size)
    n, k = weight.shape
    scale = steps.amax(1) / MAX_GROUP_SCALE  # (N,)
    nearest = (steps / scale[:, None]).round()
    integer = torch.empty_like(steps)
    for rows in row_chunks(n, k):
        groups = weight[rows].float().unflatten(1, (-1, group_size))
        row_scale = scale[rows, None]
        around = [(nearest[rows] + d).clamp(1, MAX_GROUP_SCALE) * row_scale for d in (0, -1, 1)]
        integer[rows] = (_least_error((_error(groups, step), step) for step in around)[0] / row_scale).round()
    return scale, integer.to(torch.int8)


def two_level_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a zero point in each group.

    weight (N, Kp) -> scale (N,) float32, integer (N, Kp // G) int8 in 1..16, zero_point likewise in [-8, 7], such that
    integer * (code - zero_point) is an int8 for each of the 16 codes. The row's float comes from what lies farthest
    from 0 in a group's searched range; each group then takes the pair with the least squared error near its own.
    """
    steps, zeros = search_group_ranges(weight, group_size)
    n, k = weight.shape
    farthest = torch.maximum(zeros + 8, 7 - zeros) * steps
    scale = torch.maximum(farthest.amax(1) / INT8_MAX, steps.amax(1) / MAX_GROUP_SCALE)  # (N,)
    nearest = (steps / scale[:, None]).round()
    middle = (-0.5 - zeros) * steps  # of the 16 values
    integers, zero_points = torch.empty_like(zeros), torch.empty_like(zeros)
    for rows in row_chunks(n, k):
        groups = weight[rows].float().unflatten(1, (-1, group_size))
        integers[rows], zero_points[rows] = _least_error(_near(groups, nearest[rows], middle[rows], scale[rows, None]))
    return scale, integers, zero_points


def _near(groups: Tensor, nearest: Tensor, middle: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(error, integer, zero point) around a group's own; what is no int8 becomes 1 and 0, with an infinite error."""
    for integer in ((nearest + d).clamp(1, MAX_GROUP_SCALE) for d in (0, -1, 1)):
        step = integer * scale
        for zero in (((-0.5 - middle / step).round() + d).clamp(-8, 7) for d in (0, -1, 1)):
            fits = (integer * (zero + 8) <= INT8_MAX + 1) & (integer * (7 - zero) <= INT8_MAX)
            error = torch.where(fits, _error(groups, step, zero), torch.inf)
            yield error, torch.where(fits, integer, 1).to(torch.int8), torch.where(fits, zero, 0).to(torch.int8)


def _error(groups: Tensor, step: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Squared rounding error of each group: groups (rows, Kp // G, G), step and zero_point (rows, Kp // G)."""
    wide, center = step[..., None], None if zero_point is None else zero_point[..., None]
    codes = round_int4(groups, wide, center)
    if center is not None:
        codes.sub_(center)
    return codes.mul_(wide).sub_(groups).square_().sum(-1)


def _least_error(candidates: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Of the candidates (error, *values), for each element the values with the least error, the first of equals."""
    least, best = None, []
    for error, *values in candidates:
        if least is None:
            least, best = error, values
        else:
            better = error < least
            least = torch.where(better, error, least)
            best = [torch.where(better, new, old) for new, old in zip(values, best, strict=True)]
    return best


def row_chunks(n: int, k: int):
    """Slices of rows with about CHUNK_ELEMENTS elements each."""
    rows = max(1, CHUNK_ELEMENTS // k)
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))
