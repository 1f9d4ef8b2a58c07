"""W8A8: int8 weights and int8 activations, one exact integer product. The form that int8 units are made for.

With rotate and smooth the product is of x' = (x / s) H and W' = (W diag(s)) H, as in the layers with an SVD branch: one
channel with outliers sets the step of the whole token, unless they are spread first.

Two layers: `w8a8` finds the scale of each token as it comes, `w8a8_static` has one scale and one zero point for all
activations, from calibration: less work, and less accurate where tokens differ.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..functional import scale_of_range
from ..kernels import ops, reference
from ..kernels.operands import require_int32_sums
from .algorithms import ranges, smoothing
from .algorithms.rounding import quantize_rows_int8, quantize_rows_int8_affine
from .base import QuantLinear, Scheme, register
from .stats import Stats

ROTATION = 64  # features of a rotated group


class W8A8Scheme(Scheme):
    """int8 weights, one scale per output channel; int8 activations, one scale per token, symmetric."""

    rotate: bool = Field(
        False,
        description="Hadamard rotation of every 64 features, which spreads outliers; pads the features to whole groups",
    )
    smooth: Literal["auto", "activations", "none"] = Field(
        "none",
        description="move outliers of activations into the weights, by a factor for each feature, from calibration "
        "data; 'auto': if there is any",
    )
    smooth_alpha: float = Field(0.5, ge=0, le=1, description="share of the outliers that moves")

    zero_point: bool = Field(
        False,
        description="give the weights of each row a zero point too; helps only rows that lie to one side of zero",
    )

    def largest_product(self) -> int:
        """Of what one activation and one weight can contribute to the integer sum."""
        return 127 * (255 if self.zero_point else 127)

    def check_shape(self, in_features: int, out_features: int) -> None:
        padding = ROTATION if self.rotate else 0
        require_int32_sums(in_features + padding, self.largest_product())

    def needs_data(self) -> str:
        if self.smooth == "activations":
            return "smooth: activations needs calibration data; give some, or set smooth: auto"
        return ""


class W8A8StaticScheme(W8A8Scheme):
    """As w8a8, with one scale and one zero point for all activations, from calibration data."""

    act_range: Literal["mse", "minmax", "absmax", "percentile"] = Field(
        "mse",
        description="what the scale covers. mse: the range with the least squared error; minmax: from the least to "
        "the greatest value; absmax: the same to both sides, zero point 0; percentile: all but the extremes. With "
        "rotate or smooth: of a sample of tokens",
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="of the values of a sample of tokens, with act_range: percentile"
    )

    def largest_product(self) -> int:
        return 255 * (255 if self.zero_point else 127)

    def needs_data(self) -> str:
        return "w8a8_static needs calibration data for the scale of its activations; give some, or take w8a8"


@register("w8a8")
class W8A8Linear(QuantLinear):
    """y = s_a s_w sum_k qa (qw - z_w) + bias, with s_a = absmax / 127 of each token; y comes back in x's dtype.

    Kp is K, with rotation padded to a multiple of 64.

    qweight        (N, Kp) int8
    scale          (N,)    float32
    zero_point     (N,)    int8; none unless the scheme has zero_point
    smooth_factor  (K,)    float32, activations are divided by it; none without smoothing
    """

    Scheme = W8A8Scheme
    needs = frozenset({"absmax"})

    @property
    def rotation(self) -> int:
        """Features of a rotated group; 0: no rotation."""
        return ROTATION if self.scheme.rotate else 0

    def _allocate(self, device: torch.device) -> None:
        n, k = self.out_features, self.in_features
        padded = -(-k // ROTATION) * ROTATION if self.scheme.rotate else k
        zero_point = torch.zeros(n, dtype=torch.int8, device=device) if self.scheme.zero_point else None
        smooth_factor = torch.ones(k, dtype=torch.float32, device=device) if self.scheme.smooth != "none" else None
        self.register_buffer("qweight", torch.zeros(n, padded, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(n, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("smooth_factor", smooth_factor)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        if stats is None and self.scheme.needs_data():
            raise ValueError(self.scheme.needs_data())
        weight = self._changed(weight, stats)
        self._fit_activations(weight, stats)
        if self.scheme.zero_point:
            self.qweight, self.scale, self.zero_point = quantize_rows_int8_affine(weight)
        else:
            self.qweight, self.scale = quantize_rows_int8(weight)

    def _fit_activations(self, weight: Tensor, stats: Stats | None) -> None:
        """What a subclass has to know of the activations; weight (N, Kp) is smoothed and rotated as they are."""

    def _changed(self, weight: Tensor, stats: Stats | None) -> Tensor:
        """(W diag(s)) H, (N, Kp), of W (N, K); fills smooth_factor."""
        if self.smooth_factor is not None and stats is not None:
            self.smooth_factor = smoothing.smooth_by_activations(weight, stats.absmax, self.scheme.smooth_alpha)
            weight = weight.float() * self.smooth_factor
        weight = F.pad(weight, (0, self.qweight.shape[1] - weight.shape[1]))
        return reference.rotate_groups(weight.float(), self.rotation) if self.rotation else weight

    def _linear(self, x: Tensor) -> Tensor:
        return self._product(x, None, None)

    def _product(self, x: Tensor, act_scale: Tensor | None, act_zero_point: Tensor | None) -> Tensor:
        return ops.call(
            ops.w8a8_linear,
            x,
            self.qweight,
            self.scale,
            self.zero_point,
            act_scale,
            act_zero_point,
            self.bias,
            self.smooth_factor,
            self.rotation,
        )

    def dequantize(self) -> Tensor:
        return reference.w8a8_dequantize(
            self.in_features, self.qweight, self.scale, self.zero_point, self.smooth_factor, self.rotation
        )


@register("w8a8_static")
class W8A8StaticLinear(W8A8Linear):
    """y = s_a s_w sum_k (qa - z_a) (qw - z_w) + bias, with s_a and z_a fixed by calibration.

    Activations beyond what calibration saw are clipped. The buffers of W8A8Linear, and

    act_scale       ()  float32
    act_zero_point  ()  int8
    """

    Scheme = W8A8StaticScheme
    needs = frozenset({"range", "absmax"})

    def _allocate(self, device: torch.device) -> None:
        super()._allocate(device)
        self.register_buffer("act_scale", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("act_zero_point", torch.zeros((), dtype=torch.int8, device=device))

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        if stats is None or stats.range is None:
            raise ValueError(self.scheme.needs_data())
        super().quantize(weight, stats)

    def _fit_activations(self, weight: Tensor, stats: Stats | None) -> None:
        ends = torch.tensor(self._range(weight, stats), dtype=torch.float32, device=weight.device)
        symmetric = self.scheme.act_range == "absmax"
        self.act_scale, self.act_zero_point = scale_of_range(*ends, bits=8, symmetric=symmetric)

    def _range(self, weight: Tensor, stats: Stats) -> tuple[float, float]:
        """weight: smoothed and rotated, as the activations are that the range is for."""
        sample, extremes = stats.sample, stats.range
        if self.rotation or self.smooth_factor is not None:  # the extremes are known of raw activations only
            sample = reference.smooth_and_rotate(sample, self.smooth_factor, weight.shape[1], self.rotation)
            extremes = tuple(end.item() for end in torch.aminmax(sample))
        if self.scheme.act_range == "percentile":
            return ranges.percentile_range(sample, self.scheme.percentile)
        if self.scheme.act_range == "mse":
            return ranges.mse_range(sample, weight.float().square().sum(0), *extremes)
        return extremes

    def _linear(self, x: Tensor) -> Tensor:
        return self._product(x, self.act_scale, self.act_zero_point)
