"""Branch and residual in turn: a branch for what 4 bits cannot hold, not for what is largest.

The best low-rank part of a weight leaves the smallest residual. What is wanted is the one whose residual has the
smallest rounding error,

    min over L of  |W - L - Q(W - L)|^2

SVDQuant (Li et al., arXiv 2411.05007) takes turns: Q of what L leaves, L from what Q leaves, until the error grows.
W - Q changes little from one turn to the next, so that one step of subspace iteration, from the singular vectors of the
last turn, finds the new ones.
"""

from collections.abc import Callable

from torch import Tensor

from .lowrank import OVERSAMPLING, factors, leading, subspace_iteration


def alternate(
    weight: Tensor, rank: int, solver: str, rounded: Callable[[Tensor], Tensor], iterations: int
) -> tuple[Tensor, Tensor]:
    """weight (N, K) float32 -> up (N, R), down (R, K), those of :func:`.lowrank.low_rank` after 0 iterations.

    rounded: the residual (N, K) as its codes will hold it. iterations: turns at most; it stops when the error grows.
    """
    u, s, vh = leading(weight, rank, solver)
    triplets = u[:, : rank + OVERSAMPLING], s, vh
    best, least = factors(triplets, rank), None
    for turn in range(iterations + 1):
        up, down = factors(triplets, rank)
        residual = weight - up @ down
        lost = residual - rounded(residual)
        error = lost.square().sum()
        if least is not None and not error < least:
            break
        best, least = (up, down), error
        if turn < iterations:
            triplets = subspace_iteration(up @ down + lost, triplets[0], 1)
    return best
