"""A time only counts if the answer is right: how far a layer's output is from what it should be.

Two errors, both relative, in the Frobenius norm, against float64. `formula` compares with the layer's own
dequantized formula and sees the kernel alone: it must be as small as the arithmetic promises. `weights`
compares with the float layer that was quantized, and sees the quantization too: codes and scales that fit
each other, but not the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgraft.kernels import reference
from qgraft.layers import QuantLinear

# Kernel error by type of the output, whose rounding it is for the 16-bit types.
FORMULA_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# Quantization error on Gaussian weights and activations: 8 bits lose 0.8 %, 4 bits on both sides about 13 %.
WEIGHTS_LIMIT = {"w8a32": 0.02, "w8a16": 0.02, "w4a4_svd": 0.2}
WEIGHTS_LIMIT_OTHERS = 0.2
# Rows compared; each token is multiplied by the whole weight, so a few of them see all of it.
ROWS = 64


@dataclass(frozen=True)
class Errors:
    """Relative errors and whether both are within their limits."""

    formula: float
    weights: float
    ok: bool


def check(layer: QuantLinear, linear: nn.Linear, x: Tensor, y: Tensor) -> Errors:
    """Errors of the output y = layer(x), (M, N), of a layer made from `linear`."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS), device=x.device).long()
    x, y = x[rows], y[rows].double()
    formula = _relative(y, FORMULAS.get(layer.scheme_name, _weight_only)(layer, x))
    weights = _relative(y, _linear(x, linear.weight, linear.bias))
    limit = WEIGHTS_LIMIT.get(layer.scheme_name, WEIGHTS_LIMIT_OTHERS)
    # Written so that NaN fails.
    ok = formula <= FORMULA_LIMIT[x.dtype] and weights <= limit
    return Errors(formula, weights, ok)


def _relative(y: Tensor, exact: Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def _weight_only(layer: QuantLinear, x: Tensor) -> Tensor:
    return _linear(x, layer.dequantize(), layer.bias)


def _svdq(layer: QuantLinear, x: Tensor) -> Tensor:
    """The rounding of activations is part of the formula; the sums are in float64."""
    s = layer.scheme
    quantized = reference.svdq_quantize(
        x, layer.smooth_factor, layer.proj_down, layer.padded_features, s.group_size, s.rotate,
        layer.group_scale is not None, layer.act_bits,
    )  # fmt: skip
    return reference.svdq_gemm(
        *quantized, layer.qweight, layer.scale, layer.group_scale, layer.proj_up, layer.bias, s.group_size,
        torch.float64,
    )  # fmt: skip


# A scheme that rounds activations needs its formula here; without one the gate compares it with the unrounded
# product, and stops it.
FORMULAS: dict[str, Callable[[QuantLinear, Tensor], Tensor]] = {"w4a4_svd": _svdq}
