"""W8A16: int8 weights, bfloat16 or float16 activations, float32 sums. Half the memory of a 16-bit model."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels import ops, reference
from ..kernels.operands import HALF
from .algorithms.rounding import quantize_rows_int8
from .base import QuantLinear, Scheme, register
from .stats import Stats


class W8A16Scheme(Scheme):
    """Symmetric int8, one scale per output channel; activations in 16 bit."""

    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        "auto",
        description="what float32 activations are rounded to; 'auto' is the weight's type if that has 16 bits, "
        "else bfloat16. Activations that come in 16 bit stay as they are.",
    )


@register("w8a16")
class W8A16Linear(QuantLinear):
    """y = (x @ qweight^T) * scale + bias with x in 16 bit, sums and scale in float32; y comes back in x's dtype.

    qweight  (N, K) int8 in [-127, 127]
    scale    (N,)   float32, within 3 % of absmax of the row / 127
    """

    Scheme = W8A16Scheme

    def _allocate(self, device: torch.device) -> None:
        n, k = self.out_features, self.in_features
        self.register_buffer("qweight", torch.zeros(n, k, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(n, dtype=torch.float32, device=device))

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        self.qweight, self.scale = quantize_rows_int8(weight)

    @property
    def activation_dtype(self) -> torch.dtype:
        """What float32 input is rounded to before the product."""
        if self.scheme.dtype != "auto":
            return getattr(torch, self.scheme.dtype)
        return self.dtype if self.dtype in HALF else torch.bfloat16

    def _linear(self, x: Tensor) -> Tensor:
        act = x if x.dtype in HALF else x.to(self.activation_dtype)
        y = ops.call(ops.w8a16_linear, act, self.qweight, self.scale, self.bias)
        return y if act is x else y.to(x.dtype)

    def dequantize(self) -> Tensor:
        return reference.w8_dequantize(self.qweight, self.scale)
