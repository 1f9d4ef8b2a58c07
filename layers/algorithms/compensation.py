"""A weight that makes up for what the layers before it lost.

Calibrated layer by layer, a layer gets inputs x~ that are not those of the float model, x. The weight that gives the
float model's outputs from them, in the least squares sense,

    min over W* of  E |x W^T - x~ W*^T|^2,     W* = W C (H + damping)^-1,   C = E[x^T x~],  H = E[x~^T x~]

is then the one to quantize. After GPTAQ (Li et al., arXiv 2504.02692) and Qronos (Zhang et al., arXiv 2505.11695),
which put the same least squares problem inside GPTQ's loop; solved before it, it serves any rounding.
"""

import torch
from torch import Tensor


def compensate(weight: Tensor, second_moment: Tensor, cross_moment: Tensor, damping: float) -> Tensor:
    """weight (N, K) float -> W* (N, K) float32. second_moment H and cross_moment C (K, K) float32.

    damping: share of the mean of H's diagonal that holds W* to W in directions of which the data says little.

    Equal moments give the weight back as it is, and so does data that is all zero or too large for float32.
    """
    weight = weight.float()
    ridge = damping * second_moment.diagonal().mean()
    if ridge <= 0 or torch.equal(second_moment, cross_moment):
        return weight
    # W C - W H is what x and x~ differ by: the correction is zero where they do not, whatever the damping.
    damped = second_moment.clone()
    damped.diagonal().add_(ridge)
    change = weight @ (cross_moment - second_moment)  # (N, K)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # not even the ridge makes it positive: nothing to rely on
        return weight
    made_up = weight + torch.cholesky_solve(change.t(), factor).t()
    return made_up if torch.isfinite(made_up).all() else weight  # activations or weights near the end of float32
