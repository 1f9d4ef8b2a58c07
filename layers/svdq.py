"""W4A4 with an SVD branch: int4 weights, int4 activations, and rank 32 in 16 bit for what 4 bits cannot hold.

After SVDQuant (Li et al., arXiv 2411.05007), with a Hadamard rotation inside each group and two-level scales:

    W'   = (W diag(s)) H                     smoothed, rotated weight
    U D  = a rank-r part of W'               in 16 bit
    R    = W' - U D                          the residual, in int4
    x'   = (x / s) H                         in int4 with a zero point, per token and group, at run time; int8 per
                                             token in W4A8
    y    = Q(x') Q(R)^T + x (diag(1/s) H D^T) U^T + bias

The down-projection is stored in the basis of x as it comes: the branch sees neither smoothing nor rotation. s may be
negative: the signs of features before the rotation are part of it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import ops, reference
from ..kernels.packing import pack_group_scale, pack_int4
from ..kernels.reference import TINY
from .algorithms import rounding, signs, smoothing
from .algorithms.gptq import gptq_int4
from .algorithms.lowrank import low_rank
from .base import register
from .int4 import Int4Linear
from .stats import Stats
from .svdq_scheme import SVDQScheme, SVDQW4A4Scheme

ALPHA_BY_WEIGHTS = 0.1
# Output features that the search for alpha looks at, evenly spread: enough to tell the shares apart.
SEARCH_ROWS = 512


@register("w4a4_svd")
class SVDQW4A4Linear(Int4Linear):
    """int4 x int4 with a low-rank branch. The buffers of Int4Linear, and

    scale          (N,)          float32 (two_level), or (N, Kp // G) float32 (group, group_half)
    group_scale    (N, Kp // G)  uint8 (two_level), or none: an integer 1..16 and a zero point, see pack_group_scale
    """

    Scheme = SVDQW4A4Scheme
    needs = frozenset({"absmax", "second_moment"})
    act_bits = 4
    # The smooth_alpha that was taken or found; None before quantize(), and without smoothing.
    chosen_alpha: float | None = None

    @property
    def uses_zero_point(self) -> bool:
        return self.scheme.uses_zero_point

    def _allocate(self, device: torch.device) -> None:
        super()._allocate(device)
        n, groups = self.out_features, self.padded_features // self.group_size
        two_level = self.scheme.scales == "two_level"
        self._buffer("smooth_factor", (self.in_features,), torch.float32, device, self.scheme.has_factor())
        self._buffer("scale", (n,) if two_level else (n, groups), torch.float32, device)
        self._buffer("group_scale", (n, groups), torch.uint8, device, two_level)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        s = self.scheme
        if stats is None and s.needs_data():
            raise ValueError(s.needs_data())
        if s.has_factor():
            self.smooth_factor = self._as_stored(self._smooth(weight.float(), stats))
            chosen = self._signs(weight, stats)
            if chosen is not None:
                self.smooth_factor = self.smooth_factor * chosen
        weight, zero = self._residual(weight), None  # (N, Kp)
        if s.scales == "two_level":
            if s.uses_zero_point:
                self.scale, integer, zero = rounding.two_level_ranges(weight, s.group_size)
            else:
                self.scale, integer = rounding.two_level_scales(weight, s.group_size)
            self.group_scale = pack_group_scale(integer, torch.zeros_like(integer) if zero is None else zero)
            steps = self.scale[:, None] * integer
        else:
            self.scale = steps = self._as_stored(rounding.search_group_steps(weight, s.group_size))
        if stats is not None and s.rounding != "rtn":
            codes = gptq_int4(weight, steps, self._moment_in_groups(stats.second_moment), s.group_size, zero)
        else:
            center = None if zero is None else zero.repeat_interleave(s.group_size, 1)
            codes = rounding.round_int4(weight, steps.repeat_interleave(s.group_size, 1), center).to(torch.int8)
        self.qweight = pack_int4(codes)

    def _signs(self, weight: Tensor, stats: Stats | None) -> Tensor | None:
        """(K,) of -1 and 1 on the weight's device, or None; weight (N, K)."""
        s, k = self.scheme, self.in_features
        if not s.rotate or s.rotation_signs == "none":
            return None
        if stats is None or s.rotation_signs == "random":
            return signs.random_signs(k).to(weight.device)
        rows = weight[:: -(-len(weight) // SEARCH_ROWS)].float() * self.smooth_factor
        if s.rank:  # what the branch takes is not rounded
            up, down = low_rank(rows, min(s.rank, len(rows)))
            rows = rows - up @ down
        inputs = stats.sample / self.smooth_factor
        padding = (0, self.padded_features - k)
        return signs.search_signs(F.pad(inputs, padding), F.pad(rows, padding), self.group_size)[:k]

    def _as_stored(self, factors: Tensor) -> Tensor:
        """Positive float32 numbers, with scales: group_half rounded to what the layer's 16-bit type holds."""
        if self.scheme.scales != "group_half":
            return factors
        dtype = torch.finfo(self.half_dtype)
        return factors.clamp(dtype.smallest_normal * dtype.eps, dtype.max).to(self.half_dtype).float()

    def _smooth(self, weight: Tensor, stats: Stats | None) -> Tensor:
        """The factor, (K,); notes the alpha that it is made with."""
        if self.scheme.smooth == "none":
            return torch.ones(self.in_features, device=weight.device)
        alpha = self.scheme.smooth_alpha
        if stats is None or self.scheme.smooth == "weights":
            alpha = ALPHA_BY_WEIGHTS if alpha is None else alpha
            factor = smoothing.smooth_by_weights(weight, alpha)
        else:
            if alpha is None:
                rows = weight[:: -(-len(weight) // SEARCH_ROWS)]
                # Without what would take long thirteen times, and moves the best share little.
                quick: dict[str, Any] = {"iterations": 0}
                if self.scheme.rotation_signs != "random":
                    quick["rotation_signs"] = "none"
                alpha = smoothing.search_alpha(
                    lambda alpha: self._output_error(rows, stats, smooth_alpha=alpha, **quick)
                )
            factor = smoothing.smooth_by_activations(weight, stats.absmax, alpha)
        self.chosen_alpha = alpha
        return factor

    def ingredients(self, weight: Tensor, stats: Stats) -> dict[str, float]:
        """What each ingredient is worth in this layer: by how many dB the error of its output grows without it.

        weight (N, K) float, the one that was quantized, of which up to 512 rows are looked at.
        """
        s, rows = self.scheme, weight.float()[:: -(-len(weight) // SEARCH_ROWS)]
        chosen = {"smooth_alpha": self.chosen_alpha, "rounding": s.rounding}
        signs = s.rotation_signs if s.rotate and s.has_factor() else "none"
        without = {
            # Signs that are there by themselves go with the smoothing: they are not part of what it is worth.
            "smoothing": {"smooth": "none", "rotation_signs": "searched" if signs == "auto" else signs},
            "rotation": {"rotate": False},
            "signs": {"rotation_signs": "none"},
            "branch": {"rank": 0},
            "iterations": {"iterations": 0},
            "gptq": {"rounding": "rtn"},
            "zero_points": {"zero_point": False} | ({"act_zero_point": False} if s.uses_act_zero_point else {}),
        }
        used = {
            "smoothing": s.smooth != "none",
            "rotation": s.rotate,
            "signs": signs != "none",
            "branch": s.rank > 0,
            "iterations": s.rank > 0 and s.iterations > 0,
            "gptq": s.rounding != "rtn",
            "zero_points": s.uses_zero_point or s.uses_act_zero_point,
        }
        least = max(self._output_error(rows, stats, **chosen), TINY)
        return {
            name: 10 * math.log10(max(self._output_error(rows, stats, **chosen | options), TINY) / least)
            for name, options in without.items()
            if used[name]
        }

    def _output_error(self, weight: Tensor, stats: Stats, **options: Any) -> float:
        """Squared error of the output on a sample of tokens with other options; rounded to nearest unless they say."""
        rank = min(self.scheme.rank, len(weight))
        scheme = self.scheme.model_copy(update={"rank": rank, "rounding": "rtn"} | options)
        trial = type(self)(self.in_features, len(weight), False, scheme=scheme, device=weight.device, dtype=self.dtype)
        trial.quantize(weight, stats)
        error = trial(stats.sample) - stats.sample @ weight.t()
        return error.square().sum().item()

    def _linear(self, x: Tensor) -> Tensor:
        s = self.scheme
        return ops.call(
            ops.svdq_linear,
            x,
            self.qweight,
            self.scale,
            self.group_scale,
            self.smooth_factor,
            self.proj_down,
            self.proj_up,
            self.bias,
            s.group_size,
            s.rotate,
            self.act_bits,
            s.uses_act_zero_point,
        )

    def dequantize(self) -> Tensor:
        return reference.svdq_dequantize(
            self.in_features,
            self.qweight,
            self.scale,
            self.group_scale,
            self.smooth_factor,
            self.proj_down,
            self.proj_up,
            self.scheme.group_size,
            self.scheme.rotate,
        )


@register("w4a8_svd")
class SVDQW4A8Linear(SVDQW4A4Linear):
    """int4 weights and int8 activations, one scale per token, with the buffers and the branch of SVDQW4A4Linear.

    More accurate at the same cost wherever the units multiply int8 anyway (a CPU, Hopper).
    """

    Scheme = SVDQScheme
    act_bits = 8
