"""W4A4 with an SVD branch: int4 weights, int4 activations, and rank 32 in 16 bit for what 4 bits cannot hold.

After SVDQuant (Li et al., arXiv 2411.05007), with a Hadamard rotation inside each group and two-level scales:

    W'   = (W diag(s)) H                     smoothed, rotated weight
    U D  = the best rank-r part of W'        in 16 bit
    R    = W' - U D                          the residual, in int4
    x'   = (x / s) H                         in int4, per token and group, at run time
    y    = Q(x') Q(R)^T + x (diag(1/s) H D^T) U^T + bias

The down-projection is stored in the basis of x as it comes: the branch sees neither smoothing nor rotation.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..kernels import ops, reference
from ..kernels.packing import pack_int4
from .algorithms import rounding, smoothing
from .algorithms.gptq import gptq_int4
from .algorithms.lowrank import low_rank
from .base import QuantLinear, Scheme, register
from .stats import Stats

ALPHA, ALPHA_BY_WEIGHTS = 0.5, 0.1


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
        description="share of the outliers that moves to the other side; none given: 0.5 by activations, 0.1 by "
        "weights, which know less (0.5 there takes SmolLM2's perplexity from 41 to 70)",
    )
    rotate: bool = Field(True, description="Hadamard rotation inside each group")
    scales: Literal["two_level", "group"] = Field(
        "two_level",
        description="two_level: one float a row times an integer 1..16 a group, one int8 product for the whole "
        "row; group: a float a group, 1 to 3 % more accurate, slower",
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

    def needs_data(self) -> str:
        if self.smooth == "activations":
            return "smooth: activations needs calibration data; give some, or set smooth: weights"
        if self.rounding == "gptq":
            return "rounding: gptq needs calibration data; give some, or set rounding: rtn"
        return ""


@register("w4a4_svd")
class SVDQW4A4Linear(QuantLinear):
    """int4 x int4 with a low-rank branch. Kp is in_features rounded up to a multiple of group_size G, R the rank.

    qweight        (N, Kp // 2)  uint8, two int4 codes a byte, low nibble first
    scale          (N,)          float32 (two_level), or (N, Kp // G) float32 (group)
    group_scale    (N, Kp // G)  uint8 in 1..16 (two_level), or none
    smooth_factor  (K,)          float32, activations are divided by it; none with smooth: none
    proj_down      (K, R)        bfloat16 or float16, applied to x as it comes; none with rank 0
    proj_up        (N, R)        likewise
    """

    Scheme = SVDQScheme
    needs = frozenset({"absmax", "second_moment"})
    act_bits = 4

    @property
    def padded_features(self) -> int:
        return -(-self.in_features // self.scheme.group_size) * self.scheme.group_size

    def _allocate(self, device: torch.device) -> None:
        n, k, s = self.out_features, self.in_features, self.scheme
        groups = self.padded_features // s.group_size
        branch = self.dtype if self.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        two_level, smooth, low = s.scales == "two_level", s.smooth != "none", s.rank > 0

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, used: bool = True) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if used else None)

        buffer("qweight", (n, self.padded_features // 2), torch.uint8)
        buffer("scale", (n,) if two_level else (n, groups), torch.float32)
        buffer("group_scale", (n, groups), torch.uint8, two_level)
        buffer("smooth_factor", (k,), torch.float32, smooth)
        buffer("proj_down", (k, s.rank), branch, low)
        buffer("proj_up", (n, s.rank), branch, low)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        s = self.scheme
        if stats is None and s.needs_data():
            raise ValueError(s.needs_data())
        weight = weight.float()
        if s.smooth != "none":
            self.smooth_factor = self._smooth(weight, stats)
            weight = weight * self.smooth_factor
        weight = self._to_groups(weight)  # (N, Kp)
        if s.rank:
            weight = self._split_off_branch(weight)
        if s.scales == "two_level":
            self.scale, self.group_scale = rounding.two_level_scales(weight, s.group_size)
            steps = self.scale[:, None] * self.group_scale
        else:
            self.scale = steps = rounding.search_group_steps(weight, s.group_size)
        if stats is not None and s.rounding != "rtn":
            codes = gptq_int4(weight, steps, self._moment_in_groups(stats.second_moment), s.group_size)
        else:
            codes = rounding.round_int4(weight, steps.repeat_interleave(s.group_size, 1)).to(torch.int8)
        self.qweight = pack_int4(codes)

    def _smooth(self, weight: Tensor, stats: Stats | None) -> Tensor:
        alpha = self.scheme.smooth_alpha
        if stats is not None and self.scheme.smooth != "weights":
            return smoothing.smooth_by_activations(weight, stats.absmax, ALPHA if alpha is None else alpha)
        return smoothing.smooth_by_weights(weight, ALPHA_BY_WEIGHTS if alpha is None else alpha)

    def _to_groups(self, rows: Tensor) -> Tensor:
        """Pad the last dimension from K to Kp and rotate it."""
        rows = F.pad(rows, (0, self.padded_features - rows.shape[-1]))
        return reference.rotate_groups(rows, self.scheme.group_size) if self.scheme.rotate else rows

    def _split_off_branch(self, weight: Tensor) -> Tensor:
        """Fill proj_up and proj_down from the weight (N, Kp); return what is left of it."""
        up, down = low_rank(weight, self.scheme.rank, self.scheme.svd)
        if self.scheme.rotate:
            down = reference.rotate_groups(down, self.scheme.group_size)  # back: H is its own inverse
        down = down[:, : self.in_features]
        if self.smooth_factor is not None:
            down = down / self.smooth_factor
        self.proj_up = up.to(self.proj_up.dtype)
        self.proj_down = down.t().contiguous().to(self.proj_down.dtype)
        # The residual is taken from the factors as they are stored, so that it makes up for their rounding.
        stored = self.proj_down.float().t()
        if self.smooth_factor is not None:
            stored = stored * self.smooth_factor
        return weight - self.proj_up.float() @ self._to_groups(stored)

    def _moment_in_groups(self, second_moment: Tensor) -> Tensor:
        """The second moment of x' = (x / s) H from that of x, (K, K) -> (Kp, Kp)."""
        if self.smooth_factor is not None:
            second_moment = second_moment / self.smooth_factor / self.smooth_factor[:, None]
        return self._to_groups(self._to_groups(second_moment).t().contiguous())

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
