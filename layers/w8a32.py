"""W8A32: int8 weights, float32 activations. A quarter of the memory, the accuracy of float32 arithmetic."""

import torch
from torch import Tensor

from ..kernels import ops, reference
from .algorithms.rounding import quantize_rows_int8
from .base import QuantLinear, Scheme, register
from .stats import Stats


class W8A32Scheme(Scheme):
    """No options: symmetric int8, one scale per output channel."""


@register("w8a32")
class W8A32Linear(QuantLinear):
    """y = (x @ qweight^T) * scale + bias in float32, whatever the dtype of x; y comes back in x's dtype.

    qweight  (N, K) int8 in [-127, 127]
    scale    (N,)   float32, within 3 % of absmax of the row / 127
    """

    Scheme = W8A32Scheme

    def _allocate(self, device: torch.device) -> None:
        n, k = self.out_features, self.in_features
        self.register_buffer("qweight", torch.zeros(n, k, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(n, dtype=torch.float32, device=device))

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        self.qweight, self.scale = quantize_rows_int8(weight)

    def _linear(self, x: Tensor) -> Tensor:
        return ops.call(ops.w8a32_linear, x.float(), self.qweight, self.scale, self.bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        return reference.w8_dequantize(self.qweight, self.scale)
