"""A weight that makes up for what the layers before it lost.

Calibrated layer by layer, a layer gets inputs x~ that are not those of the float model, x. The weight that gives the
float model's outputs from them, in the least squares sense,

    min over W* of  E |x W^T - x~ W*^T|^2,     W* = W + W D (H + damping)^-1,   D = E[(x - x~)^T x~],  H = E[x~^T x~]

is then the one to quantize. After GPTAQ (Li et al., arXiv 2504.02692) and Qronos (Zhang et al., arXiv 2505.11695),
which put the same least squares problem inside GPTQ's loop; solved before it, it serves any rounding.

Of a few thousand tokens, H has directions that are noise, and the less so the more tokens there are, the fewer features
and the weaker the noise of the activations. How much damping that asks for is found by cross-validation: what one half
of the data says is tried on the other.
"""

import torch
from torch import Tensor

from .cholesky import factor_in_place

DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
USUAL = 1.0  # where there is nothing to try it on
ROWS = 512  # of the weight, to try on


def compensate(weight: Tensor, second_moment: Tensor, drift_moment: Tensor, damping: float) -> Tensor:
    """weight (N, K) float -> W* (N, K) float32. second_moment H and drift_moment D (K, K) float32.

    damping: share of the mean of H's diagonal that holds W* to W in directions of which the data says little.

    No drift gives the weight back as it is, and so does data that is all zero or too large for float32.
    """
    weight = weight.float()
    made_up = weight + correction(weight @ drift_moment, second_moment, damping)
    return made_up if torch.isfinite(made_up).all() else weight  # activations or weights near the end of float32


def correction(change: Tensor, second_moment: Tensor, damping: float) -> Tensor:
    """change W D (N, K) -> W D (H + damping)^-1, or zeros where H is no help. D and H may be sums over tokens: their
    number cancels out."""
    ridge = damping * second_moment.diagonal().mean()
    if ridge <= 0:
        return torch.zeros_like(change)
    damped = second_moment.clone()
    damped.diagonal().add_(ridge)
    if not factor_in_place(damped):  # not even the ridge makes it positive
        return torch.zeros_like(change)
    return torch.cholesky_solve(change.t(), damped).t()


def search_damping(weight: Tensor, halves: list[tuple[Tensor, Tensor, int]]) -> float | None:
    """The damping of DAMPINGS with which each half of the data foretells the other best; None if leaving the weight as
    it is does better. Without two halves, USUAL.

    weight (N, K) float; halves: the sums that are H and D when divided by tokens, and the tokens, of each.
    """
    if len(halves) < 2:
        return USUAL
    rows = weight[torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()].float()
    changes = [rows @ drift for _, drift, _ in halves]

    def error(damping: float) -> float:
        """By how much the squared error of the output grows over that of the weight as it is; negative is better."""
        total = 0.0
        for fit, test in ((0, 1), (1, 0)):
            step = correction(changes[fit], halves[fit][0], damping)
            moment, _, tokens = halves[test]
            total += ((step @ moment - 2 * changes[test]) * step).sum().item() / tokens
        return total

    at = DAMPINGS.index(USUAL)
    best = error(DAMPINGS[at])
    for direction in (1, -1):
        start = at
        while 0 <= at + direction < len(DAMPINGS) and (found := error(DAMPINGS[at + direction])) < best:
            at, best = at + direction, found
        if at != start:
            break
    return DAMPINGS[at] if best < 0 else None
