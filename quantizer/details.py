"""What the HTML report draws of a layer, in a few kilobytes: histograms before and after, singular values.

Recorded while a layer is quantized, when the float weight and a sample of its inputs are at hand:
`Quantizer.quantize(..., details=True)`. Weights alone can be compared later, see `weight_details`.
"""

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..layers import BitNetLinear, QuantLayer, QuantLinear, Stats, SVDQW4A4Linear, W8A8Linear, W8A8StaticLinear
from .kinds import shape_of

BINS = 64
# Singular values that are kept, so that a branch of rank 32 is seen with what it leaves.
SINGULAR_VALUES = 128
DIGITS = 5


@torch.no_grad()
def layer_details(weight: Tensor, layer: QuantLayer, stats: Stats | None) -> dict[str, Any]:
    """Plain data for one layer; weight (N, K) float, stats of its inputs if there are any.

    {"weight": histograms, "input": histograms or None, "spectrum": singular values or None}
    """
    sample = None if stats is None else stats.sample
    return {**weight_details(weight, layer), "input": None if sample is None else _input(layer, sample)}


def won(weight: Tensor, layer: QuantLayer, stats: Stats | None) -> dict[str, float] | None:
    """What each ingredient of the layer's method is worth, in dB of its output's error; None if there is no data."""
    if stats is None or not isinstance(layer, SVDQW4A4Linear):
        return None
    return {name: _short(decibels) for name, decibels in layer.ingredients(weight, stats).items()}


@torch.no_grad()
def weight_details(weight: Tensor, layer: QuantLayer) -> dict[str, Any]:
    """The part of it that needs no data: a float weight (N, K) and the layer that was made of it."""
    weight = weight.detach().float()
    return {
        "weight": _histograms(weight, layer.dequantize()),
        "spectrum": _spectrum(weight, layer) if isinstance(layer, QuantLinear) else None,
    }


def _histograms(before: Tensor, after: Tensor | None) -> dict[str, Any]:
    """{"low", "high", "before", "after"}: counts in BINS equal bins of one range that holds all values."""
    both = (before,) if after is None else (before, after)
    low = min(x.min().item() for x in both)
    high = max(x.max().item() for x in both)
    if low == high:  # all values are one: a range around it
        low, high = low - 0.5, high + 0.5
    counts = [torch.histc(x.float(), BINS, low, high).long().tolist() for x in both]
    return {
        "low": _short(low),
        "high": _short(high),
        "before": counts[0],
        "after": counts[1] if len(counts) > 1 else None,
    }


def _input(layer: QuantLayer, sample: Tensor) -> dict[str, Any]:
    """Histograms of a sample of inputs (S, K), as they came and as the layer rounds them; and their outliers.

    peak: the greatest value over the root mean square, the mean over tokens. peak_rounded: the same of what is
    really rounded, which smoothing and rotation have made flatter.
    """
    rounded, seen = rounded_input(layer, sample)
    return {
        **_histograms(sample, seen),
        "tokens": len(sample),
        "peak": _peak(sample),
        "peak_rounded": None if rounded is None else _peak(rounded),
    }


def _peak(x: Tensor) -> float:
    rms = x.square().mean(-1).sqrt()
    return _short((x.abs().amax(-1) / rms.clamp_min(1e-30)).mean().item())


def _spectrum(weight: Tensor, layer: QuantLinear) -> dict[str, Any]:
    """The leading singular values of the (smoothed) weight, its squared norm, and the rank that a branch takes.

    By randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061), torch's own.
    """
    smooth = getattr(layer, "smooth_factor", None)
    if smooth is not None:
        weight = weight * smooth
    rank = rank_of(layer)
    kept = min(max(SINGULAR_VALUES, 2 * rank), *shape_of(layer))
    # Its random start must not change what is quantized next.
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        values = torch.svd_lowrank(weight, q=min(kept + 32, *weight.shape), niter=4)[1][:kept]
    return {
        "values": [_short(v) for v in values.tolist()],
        "energy": _short(weight.double().square().sum().item()),
        "rank": rank,
    }


def rank_of(layer: QuantLayer) -> int:
    """Columns of the branch, or of the factors; 0 for a layer without."""
    branch = getattr(layer, "proj_down", None)
    rank = getattr(layer.scheme, "rank", 0) if branch is None else branch.shape[1]
    return rank if isinstance(rank, int) else 0


@singledispatch
def rounded_input(layer: QuantLayer, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a layer rounds of its inputs x (M, K): the values just before rounding, and x as it is after it.

    (None, None): nothing is rounded, or it is not known. The second is in the basis of x, with smoothing and
    rotation undone. A layer class of one's own joins by `rounded_input.register`.
    """
    return None, None


@rounded_input.register
def _(layer: W8A8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    smooth, static = layer.smooth_factor, isinstance(layer, W8A8StaticLinear)
    flat = reference.smooth_and_rotate(x, smooth, layer.qweight.shape[1], layer.rotation)
    ranges = (layer.act_scale, layer.act_zero_point) if static else (None, None)
    codes, scale = reference.w8a8_quantize(flat, *ranges)
    seen = (codes.float() - (layer.act_zero_point if static else 0)) * scale
    if layer.rotation:
        seen = reference.rotate_groups(seen, layer.rotation)  # back: H is its own inverse
    seen = seen[:, : layer.in_features]
    return flat, seen if smooth is None else seen * smooth


@rounded_input.register
def _(layer: BitNetLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = reference.w8a8_quantize(x, None, None)
    return x, codes * scale


@rounded_input.register
def _(layer: SVDQW4A4Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    s, smooth = layer.scheme, layer.smooth_factor
    flat = layer._to_groups(x if smooth is None else x / smooth)  # (M, Kp)
    codes, scale, _ = reference.svdq_quantize(
        x, smooth, None, layer.padded_features, s.group_size, s.rotate, s.scales == "two_level", layer.act_bits,
        s.uses_act_zero_point,
    )  # fmt: skip
    if scale.shape[1] > 1:  # one a group
        scale = scale.repeat_interleave(s.group_size, 1)
    seen = codes * scale
    if s.rotate:
        seen = reference.rotate_groups(seen, s.group_size)  # back: H is its own inverse
    seen = seen[:, : layer.in_features]
    return flat, seen if smooth is None else seen * smooth


def _short(number: float) -> float:
    """A few digits are enough for a picture; a report of 500 layers stays small."""
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else 0.0
