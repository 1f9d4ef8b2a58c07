"""Which range of values a static activation scale should cover: all, all but the extremes, or the least squared error.

A scale that is fixed beforehand has to trade the few largest values, which are clipped, against the resolution of
all others.
"""

import torch
from torch import Tensor

from ...functional import scale_of_range

# Shares of the lowest and of the highest value tried as ends of the range.
SHARES = tuple(0.9**i for i in range(24))  # down to 0.09
# The two ends are searched in turn; the second round changes little, and a third nothing.
ROUNDS = 2


def percentile_range(sample: Tensor, percentile: float) -> tuple[float, float]:
    """From the (100 - percentile)-th to the percentile-th of the values; sample float of any shape, not empty."""
    values = sample.flatten()
    most = values.numel()
    rank = min(most, max(1, round(most * percentile / 100)))
    return values.kthvalue(most + 1 - rank).values.item(), values.kthvalue(rank).values.item()


def mse_range(sample: Tensor, importance: Tensor, low: float, high: float) -> tuple[float, float]:
    """The range inside [low, high] whose 8-bit codes stand for the sample with the least squared error.

    sample (S, K) float32; importance (K,) float32 weighs the error of each feature. With the squared norms of the
    weight's columns this is the error of the layer's output, as far as errors of features are independent.
    """
    lowest, highest = min(low, 0.0), max(high, 0.0)

    def error(low: float, high: float) -> float:
        ends = torch.tensor([low, high], device=sample.device)
        scale, zero = scale_of_range(*ends, bits=8, symmetric=False)
        codes = ((sample / scale).round_() + zero).clamp_(-128, 127)
        return codes.sub_(zero).mul_(scale).sub_(sample).square_().matmul(importance).sum().item()

    low, high = lowest, highest
    for _ in range(ROUNDS):
        low = min((lowest * share for share in SHARES), key=lambda low: error(low, high))
        high = min((highest * share for share in SHARES), key=lambda high: error(low, high))
    return low, high
