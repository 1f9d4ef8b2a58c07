"""Smoothing: move the outliers of activation channels into the weights, where there is time to deal with them.

    x W^T = (x / s) (W diag(s))^T        s (K,) float32, positive

After SmoothQuant (Xiao et al., arXiv 2211.10438) and SVDQuant (Li et al., arXiv 2411.05007). How much should move
differs from layer to layer, so it is searched, as AWQ does (Lin et al., arXiv 2306.00978), for the least error of the
layer's output.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def smooth_by_activations(weight: Tensor, act_absmax: Tensor, alpha: float) -> Tensor:
    """s = absmax(x)^alpha / absmax(W)^(1 - alpha), per input channel. weight (N, K), act_absmax (K,) -> (K,)."""
    return _normalized(act_absmax.float() ** alpha / _column_absmax(weight) ** (1 - alpha))


def search_alpha(error: Callable[[float], float]) -> float:
    """The share in 0, 0.05, ..., 1 with the least error, found among every second one and then beside the best.

    error: of the layer's output when this share of the outliers is moved; called 13 times at most.
    """
    errors = {tenth / 10: error(tenth / 10) for tenth in range(11)}
    best = min(errors, key=errors.__getitem__)
    for beside in (round(best - 0.05, 2), round(best + 0.05, 2)):
        if 0 <= beside <= 1:
            errors[beside] = error(beside)
    return min(errors, key=errors.__getitem__)


def smooth_by_weights(weight: Tensor, alpha: float) -> Tensor:
    """Without data: s = absmax(W)^-alpha, which evens out the columns of the weight. weight (N, K) -> (K,).

    diffusers' data-free SVDQuant uses the same form with alpha 0.5.
    """
    return _normalized(_column_absmax(weight) ** -alpha)


def _column_absmax(weight: Tensor) -> Tensor:
    return weight.abs().amax(0).float()


def _normalized(smooth_factor: Tensor) -> Tensor:
    """Geometric mean 1; channels that are never used (0, infinite) keep the factor 1."""
    usable = torch.isfinite(smooth_factor) & (smooth_factor > 0)
    if not usable.any():
        return torch.ones_like(smooth_factor)
    log = torch.where(usable, smooth_factor, 1.0).log()
    log = log - (log * usable).sum() / usable.sum()
    # 2^+-20 keeps the factors, and what is divided by them, far inside float16 and bfloat16.
    return torch.where(usable, log.exp().clamp(2.0**-20, 2.0**20), 1.0)
