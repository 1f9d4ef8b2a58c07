"""W4A4 with an SVD branch: int4 weights, int4 activations, and rank 32 in 16 bit for what 4 bits cannot hold.

After SVDQuant (Li et al., arXiv 2411.05007), with a Hadamard rotation inside each group and two-level scales:

    W'   = (W diag(s)) H                     smoothed, rotated weight
    U D  = the best rank-r part of W'        in 16 bit
    R    = W' - U D                          the residual, in int4
    x'   = (x / s) H                         in int4, per token and group, at run time; int8 per token in W4A8
    y    = Q(x') Q(R)^T + x (diag(1/s) H D^T) U^T + bias

The down-projection is stored in the basis of x as it comes: the branch sees neither smoothing nor rotation.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels import ops, reference
from ..kernels.operands import FOLDED_PRODUCT, require_int32_sums
from ..kernels.packing import pack_int4
from ..kernels.reference import TINY
from .algorithms import rounding, smoothing
from .algorithms.gptq import gptq_int4
from .base import Scheme, register
from .int4 import Int4Linear
from .stats import Stats

ALPHA_BY_WEIGHTS = 0.1
# Output features that the search for alpha looks at, evenly spread: enough to tell the shares apart.
SEARCH_ROWS = 512


class SVDQScheme(Scheme):
    """Options of the SVD-branch layers."""

    rank: int = Field(32, ge=0, le=1024, description="rank of the 16-bit branch; 0: no branch")
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        64, description="input features that share a scale; also the size of the rotation; a power of two"
    )
    smooth: Literal["auto", "activations", "weights", "none"] = Field(
        "auto",
        description="what the smooth_factor comes from; 'auto': activations if there is calibration data",
    )
    smooth_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the outliers that moves to the other side; none given: by activations what makes the "
        "least error of the output, searched for each layer; by weights 0.1, which know less (0.5 there takes "
        "SmolLM2's perplexity from 41 to 70)",
    )
    rotate: bool = Field(True, description="Hadamard rotation inside each group")
    scales: Literal["two_level", "group", "group_half"] = Field(
        "two_level",
        description="two_level: one float a row times an integer 1..16 a group, one int8 product for the whole "
        "row; group: a float a group, 1 to 3 % more accurate, slower; group_half: the same with scales and "
        "smooth_factor that 16 bits hold, as nunchaku stores them",
    )
    rounding: Literal["auto", "gptq", "rtn"] = Field(
        "auto", description="gptq needs calibration data; 'auto': gptq if there is any, else nearest"
    )
    svd: Literal["randomized", "exact"] = Field("randomized", description="solver of the low-rank branch")

    def check_shape(self, in_features: int, out_features: int) -> None:
        if self.rank > min(in_features, out_features):
            raise ValueError(
                f"rank {self.rank} is more than a {out_features} x {in_features} weight has: "
                f"choose rank <= {min(in_features, out_features)}"
            )
        require_int32_sums(-(-in_features // self.group_size) * self.group_size, FOLDED_PRODUCT)

    def needs_data(self) -> str:
        if self.smooth == "activations":
            return "smooth: activations needs calibration data; give some, or set smooth: weights"
        if self.rounding == "gptq":
            return "rounding: gptq needs calibration data; give some, or set rounding: rtn"
        return ""


@register("w4a4_svd")
class SVDQW4A4Linear(Int4Linear):
    """int4 x int4 with a low-rank branch. The buffers of Int4Linear, and

    scale          (N,)          float32 (two_level), or (N, Kp // G) float32 (group, group_half)
    group_scale    (N, Kp // G)  uint8 in 1..16 (two_level), or none
    """

    Scheme = SVDQScheme
    needs = frozenset({"absmax", "second_moment"})
    # Inputs that come out of 4-bit activations are noisy, and with less damping the noise of few tokens is fitted: with
    # 8,000 tokens SmolLM2's KL divergence is .171 with 1, .189 with 0.3.
    compensation_damping = 1.0
    act_bits = 4
    # The smooth_alpha that was taken or found; None before quantize(), and without smoothing.
    chosen_alpha: float | None = None

    def _allocate(self, device: torch.device) -> None:
        super()._allocate(device)
        n, groups = self.out_features, self.padded_features // self.group_size
        two_level = self.scheme.scales == "two_level"
        self._buffer("smooth_factor", (self.in_features,), torch.float32, device, self.scheme.smooth != "none")
        self._buffer("scale", (n,) if two_level else (n, groups), torch.float32, device)
        self._buffer("group_scale", (n, groups), torch.uint8, device, two_level)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        s = self.scheme
        if stats is None and s.needs_data():
            raise ValueError(s.needs_data())
        if s.smooth != "none":
            self.smooth_factor = self._as_stored(self._smooth(weight.float(), stats))
        weight = self._residual(weight)  # (N, Kp)
        if s.scales == "two_level":
            self.scale, self.group_scale = rounding.two_level_scales(weight, s.group_size)
            steps = self.scale[:, None] * self.group_scale
        else:
            self.scale = steps = self._as_stored(rounding.search_group_steps(weight, s.group_size))
        if stats is not None and s.rounding != "rtn":
            codes = gptq_int4(weight, steps, self._moment_in_groups(stats.second_moment), s.group_size)
        else:
            codes = rounding.round_int4(weight, steps.repeat_interleave(s.group_size, 1)).to(torch.int8)
        self.qweight = pack_int4(codes)

    def _as_stored(self, factors: Tensor) -> Tensor:
        """Positive float32 numbers, with scales: group_half rounded to what the layer's 16-bit type holds."""
        if self.scheme.scales != "group_half":
            return factors
        dtype = torch.finfo(self.half_dtype)
        return factors.clamp(dtype.smallest_normal * dtype.eps, dtype.max).to(self.half_dtype).float()

    def _smooth(self, weight: Tensor, stats: Stats | None) -> Tensor:
        """The factor, (K,); notes the alpha that it is made with."""
        alpha = self.scheme.smooth_alpha
        if stats is None or self.scheme.smooth == "weights":
            alpha = ALPHA_BY_WEIGHTS if alpha is None else alpha
            factor = smoothing.smooth_by_weights(weight, alpha)
        else:
            if alpha is None:
                rows = weight[:: -(-len(weight) // SEARCH_ROWS)]
                alpha = smoothing.search_alpha(lambda alpha: self._output_error(rows, stats, smooth_alpha=alpha))
            factor = smoothing.smooth_by_activations(weight, stats.absmax, alpha)
        self.chosen_alpha = alpha
        return factor

    def ingredients(self, weight: Tensor, stats: Stats) -> dict[str, float]:
        """What each ingredient is worth in this layer: by how many dB the error of its output grows without it.

        weight (N, K) float, the one that was quantized, of which up to 512 rows are looked at.
        """
        s, rows = self.scheme, weight.float()[:: -(-len(weight) // SEARCH_ROWS)]
        chosen = {"smooth_alpha": self.chosen_alpha, "rounding": s.rounding}
        without = {"smoothing": {"smooth": "none"}, "rotation": {"rotate": False}, "branch": {"rank": 0}}
        without["gptq"] = {"rounding": "rtn"}
        used = {
            "smoothing": s.smooth != "none",
            "rotation": s.rotate,
            "branch": s.rank > 0,
            "gptq": s.rounding != "rtn",
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
        return ops.svdq_linear(
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

    compensation_damping = 0.1
    act_bits = 8
