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

from qgraft.kernels import ops, reference
from qgraft.layers import QuantLinear

# Kernel error by type of the output, whose rounding it is for the 16-bit types.
FORMULA_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# Quantization error on Gaussian weights and activations: 8 bits lose 0.8 %, 4 bits on both sides about 13 %,
# ternary weights 51 %. A Gaussian weight has no low rank, so a factorized one loses 60 %. Where so much is lost,
# `formula` is what counts, and the limit leaves room for the chance of a single token of a small layer.
WEIGHTS_LIMIT = {
    "w8a32": 0.02, "w8a16": 0.02, "w8a8": 0.03, "w8a8_static": 0.03,
    "w4a16": 0.15, "w4a8_svd": 0.15, "w4a4_svd": 0.2, "bitnet": 0.8,
    "factorized": 0.8, "factorized_w8": 0.8,
}  # fmt: skip
WEIGHTS_LIMIT_OTHERS = 0.2
# Rows compared; each token is multiplied by the whole weight, so a few of them see all of it.
ROWS = 64


@dataclass(frozen=True)
class Errors:
    """Relative errors and whether they are within their limits. Of other libraries `formula` is not known."""

    formula: float | None
    weights: float
    ok: bool


def check(layer: QuantLinear, linear: nn.Linear, x: Tensor, y: Tensor) -> Errors:
    """Errors of the output y = layer(x), (M, N), of a layer made from `linear`."""
    x, y = _some(x, y)
    formula = _relative(y, FORMULAS.get(layer.scheme_name, _weight_only)(layer, x))
    weights = _relative(y, _linear(x, linear.weight, linear.bias))
    limit = WEIGHTS_LIMIT.get(layer.scheme_name, WEIGHTS_LIMIT_OTHERS)
    # Written so that NaN fails.
    ok = formula <= FORMULA_LIMIT[x.dtype] and weights <= limit
    return Errors(formula, weights, ok)


def check_other(linear: nn.Linear, x: Tensor, y: Tensor, limit: float) -> Errors:
    """Errors of the output of anything else that stands in for `linear`, with the largest that counts as right."""
    if y.shape != (len(x), linear.out_features):
        return Errors(None, float("nan"), False)
    x, y = _some(x, y)
    weights = _relative(y, _linear(x, linear.weight, linear.bias))
    return Errors(None, weights, weights <= limit)


def _some(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS), device=x.device).long()
    return x[rows], y[rows].double()


def _relative(y: Tensor, exact: Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def _weight_only(layer: QuantLinear, x: Tensor) -> Tensor:
    return _linear(x, layer.dequantize(), layer.bias)


def _svdq(layer: QuantLinear, x: Tensor) -> Tensor:
    """The rounding of activations is part of the formula; the sums are in float64.

    The codes are the backend's own: it adds up the rotation in another order than the reference, which now and then
    puts a number on the other side of a rounding. Codes that are wrong show against the weights.
    """
    s = layer.scheme
    quantized = ops.svdq_quantize(
        x, layer.smooth_factor, layer.proj_down, layer.padded_features, s.group_size, s.rotate,
        layer.group_scale is not None, layer.act_bits, s.uses_act_zero_point,
    )  # fmt: skip
    return reference.svdq_gemm(
        *quantized, layer.qweight, layer.scale, layer.group_scale, layer.proj_up, layer.bias, s.group_size,
        torch.float64,
    )  # fmt: skip


def _w8a8(layer: QuantLinear, x: Tensor) -> Tensor:
    zero = getattr(layer, "act_zero_point", None)
    codes, steps = reference.w8a8_quantize(x, getattr(layer, "act_scale", None), zero)
    return _linear((codes.double() - (0 if zero is None else zero)) * steps.double(), layer.dequantize(), layer.bias)


# A scheme that rounds activations needs its formula here; without one the gate compares it with the unrounded
# product, and stops it.
FORMULAS: dict[str, Callable[[QuantLinear, Tensor], Tensor]] = {
    "w4a4_svd": _svdq,
    "w4a8_svd": _svdq,
    "w8a8": _w8a8,
    "w8a8_static": _w8a8,
    "bitnet": _w8a8,
}
