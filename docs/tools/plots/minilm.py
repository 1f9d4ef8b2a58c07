"""What the figures from real numbers have in common: two layers of MiniLM, and errors in decibels."""

from torch import Tensor

# Both lie early in the model, so that their inputs come cheap. Of the first the inputs come out of a LayerNorm, of the
# second out of a GELU.
AFTER_NORM, AFTER_GELU = "encoder.layer.0.intermediate.dense", "encoder.layer.1.output.dense"
# Of the W4A4 layer: nothing that is searched but for what a figure is about.
PLAIN = {"rounding": "rtn", "rotation_signs": "none", "iterations": 0}


def sqnr(approximation: Tensor, exact: Tensor) -> float:
    """Signal to noise, in dB."""
    return (20 * (exact.norm() / (approximation - exact).norm()).log10()).item()
