"""A weight as the product of two thin ones: W ~ up @ down, up (N, R), down (R, K).

Which R directions to keep is a question of what counts as an error. With M the (K, K) second moment of the inputs,

    |(W - up down) X|^2 / tokens = tr((W - up down) M (W - up down)^T)

is the squared error of the outputs, and the best choice is the leading eigenvectors of their second moment W M W^T:
up = U, down = U^T W. That is the whitened SVD of SVD-LLM (Wang et al., arXiv 2403.07378), without its inverse. M = I
gives the plain SVD of the weight, the diagonal of M the scaling of ASVD (Yuan et al., arXiv 2312.05821) by root mean
squares.
"""

import torch
from torch import Tensor

from .lowrank import OVERSAMPLING, randomized_svd

# Of the mean input energy, added to every feature: directions that no calibration token used still count a little.
DAMPING = 1e-3


def largest_rank(in_features: int, out_features: int) -> int:
    """The largest rank whose two factors have fewer numbers than the weight: R (K + N) < K N; 0 if there is none."""
    return (in_features * out_features - 1) // (in_features + out_features)


def damped(second_moment: Tensor) -> Tensor:
    """M + DAMPING * mean(diag M) I, (K, K) float64, positive definite."""
    moment = second_moment.to(torch.float64, copy=True)
    level = moment.diagonal().mean()
    moment.diagonal().add_(DAMPING * level if level > 0 else 1.0)
    return moment


def weigh(weight: Tensor, moment: Tensor | None) -> Tensor:
    """W L with M = L L^T, whose left singular vectors and values are those of the outputs. (N, K) float32.

    weight (N, K) float; moment positive definite (K, K), or its diagonal (K,), or None for the identity.
    """
    if moment is None:
        return weight.float()
    if moment.ndim == 1:
        return weight.float() * moment.sqrt().float()
    return (weight.double() @ torch.linalg.cholesky(moment)).float()


def output_directions(weighed: Tensor, rank: int | None) -> tuple[Tensor, Tensor | None]:
    """The leading left singular vectors of :func:`weigh`'s (N, K), and the squares of all its singular values.

    rank: how many are wanted, if that is known; the squares, (min(N, K),) float64, are then None where a randomized
    solver is the quicker. Returns vectors (N, rank), or all (N, min(N, K)).
    """
    n, k = weighed.shape
    if rank is not None and rank + OVERSAMPLING < min(n, k) // 2:
        return randomized_svd(weighed, rank)[0][:, :rank], None
    u, s, _ = torch.linalg.svd(weighed, full_matrices=False)
    return u[:, :rank], s.double().square()


def rank_of_energy(squares: Tensor, energy: float) -> int:
    """The smallest rank that keeps this share of the sum of squared singular values; at least 1."""
    kept = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return min(int((kept < energy).sum()) + 1, len(squares)) if squares.any() else 1


def output_squares(directions: Tensor, weight: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared output that each of the directions U (N, R) keeps, u^T W M W^T u, (R,), and that of all."""
    rows = directions.t().double() @ weight.double()  # (R, K)
    moment = second_moment.double()
    total = ((weight.double() @ moment) * weight.double()).sum()
    return ((rows @ moment) * rows).sum(1), total


def rank_of_error(kept: Tensor, total: Tensor, error: float) -> int | None:
    """The smallest rank with a relative output error of at most `error`, from :func:`output_squares`; None if none."""
    left = (1 - kept.cumsum(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_min(0).sqrt()
    enough = (left <= error).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def refit(weight: Tensor, down: Tensor, moment: Tensor | None) -> Tensor:
    """The best up for a given down: W M D^T (D M D^T)^-1, (N, R) float32.

    Makes up for whatever has been done to down since it was U^T W, such as rounding it.
    """
    weight, down = weight.double(), down.double()
    norms = down.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rows = down / norms  # of one size, or the inverse would lose the small ones
    seen = rows if moment is None else rows * moment if moment.ndim == 1 else rows @ moment  # D M
    up = (weight @ seen.t()) @ torch.linalg.pinv(seen @ rows.t(), hermitian=True)
    return (up / norms.t()).float()
