"""W8A8: int8 weights and int8 activations, one exact integer product. The form that int8 units are made for.

Two layers: `w8a8` finds the scale of each token as it comes, `w8a8_static` has one scale and one zero point for all
activations, from calibration: less work, and less accurate where tokens differ.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..functional import scale_of_range
from ..kernels import ops, reference
from ..kernels.operands import require_int32_sums
from .algorithms import ranges
from .algorithms.rounding import quantize_rows_int8, quantize_rows_int8_affine
from .base import QuantLinear, Scheme, register
from .stats import Stats


class W8A8Scheme(Scheme):
    """int8 weights, one scale per output channel; int8 activations, one scale per token, symmetric."""

    zero_point: bool = Field(
        False,
        description="give the weights of each row a zero point too; helps only rows that lie to one side of zero",
    )

    def largest_product(self) -> int:
        """Of what one activation and one weight can contribute to the integer sum."""
        return 127 * (255 if self.zero_point else 127)

    def check_shape(self, in_features: int, out_features: int) -> None:
        require_int32_sums(in_features, self.largest_product())


class W8A8StaticScheme(W8A8Scheme):
    """As w8a8, with one scale and one zero point for all activations, from calibration data."""

    act_range: Literal["mse", "minmax", "absmax", "percentile"] = Field(
        "mse",
        description="what the scale covers. mse: the range with the least squared error; minmax: from the least to "
        "the greatest value; absmax: the same to both sides, zero point 0; percentile: all but the extremes",
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

    qweight     (N, K) int8
    scale       (N,)   float32
    zero_point  (N,)   int8; none unless the scheme has zero_point
    """

    Scheme = W8A8Scheme

    def _allocate(self, device: torch.device) -> None:
        n, k = self.out_features, self.in_features
        zero_point = torch.zeros(n, dtype=torch.int8, device=device) if self.scheme.zero_point else None
        self.register_buffer("qweight", torch.zeros(n, k, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(n, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", zero_point)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        if self.scheme.zero_point:
            self.qweight, self.scale, self.zero_point = quantize_rows_int8_affine(weight)
        else:
            self.qweight, self.scale = quantize_rows_int8(weight)

    def _linear(self, x: Tensor) -> Tensor:
        return ops.w8a8_linear(x, self.qweight, self.scale, self.zero_point, None, None, self.bias)

    def dequantize(self) -> Tensor:
        return reference.w8a8_dequantize(self.qweight, self.scale, self.zero_point)


@register("w8a8_static")
class W8A8StaticLinear(W8A8Linear):
    """y = s_a s_w sum_k (qa - z_a) (qw - z_w) + bias, with s_a and z_a fixed by calibration.

    Activations beyond what calibration saw are clipped. The buffers of W8A8Linear, and

    act_scale       ()  float32
    act_zero_point  ()  int8
    """

    Scheme = W8A8StaticScheme
    needs = frozenset({"range"})

    def _allocate(self, device: torch.device) -> None:
        super()._allocate(device)
        self.register_buffer("act_scale", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("act_zero_point", torch.zeros((), dtype=torch.int8, device=device))

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        if stats is None or stats.range is None:
            raise ValueError(self.scheme.needs_data())
        super().quantize(weight)
        low, high = self._range(weight, stats)
        ends = torch.tensor([low, high], dtype=torch.float32, device=weight.device)
        symmetric = self.scheme.act_range == "absmax"
        self.act_scale, self.act_zero_point = scale_of_range(*ends, bits=8, symmetric=symmetric)

    def _range(self, weight: Tensor, stats: Stats) -> tuple[float, float]:
        if self.scheme.act_range == "percentile":
            return ranges.percentile_range(stats.sample, self.scheme.percentile)
        if self.scheme.act_range == "mse":
            return ranges.mse_range(stats.sample, weight.float().square().sum(0), *stats.range)
        return stats.range

    def _linear(self, x: Tensor) -> Tensor:
        return ops.w8a8_linear(
            x, self.qweight, self.scale, self.zero_point, self.act_scale, self.act_zero_point, self.bias
        )
