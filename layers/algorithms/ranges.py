"""Which range of values a static activation scale should cover: everything, a percentile, or the least squared error.

A scale that is fixed beforehand has to trade the few largest values, which are clipped, against the resolution of
all others. What values there are is counted while calibration runs, in a histogram that widens as it needs to.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...functional import scale_of_range

# At least a quarter of them are in use, 16 for each step of 8 bits.
BINS = 1 << 14
# Shares of the lowest and of the highest value tried as ends of the range, each with each.
SHARES = tuple(0.85**i for i in range(28))  # down to 0.012


@dataclass
class Histogram:
    """How often which value was seen, in equal bins from -reach to reach; reach is a power of two.

    A power of two, so that doubling it merges bins two by two and no value ever has to be seen again.
    """

    reach: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    counts: Tensor | None = field(default=None, repr=False)  # (BINS,) int64

    def update(self, x: Tensor) -> None:
        """Count the values of x, finite float32 of any shape, not empty."""
        low, high = (float(v) for v in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = 2.0 ** min(127, math.frexp(max(-low, high, 1e-30))[1])  # 2^128 is no float32
        if self.counts is None:
            self.reach, self.counts = reach, torch.zeros(BINS, dtype=torch.int64, device=x.device)
        while self.reach < reach:
            inner = self.counts.unflatten(0, (-1, 2)).sum(1)
            self.counts = torch.nn.functional.pad(inner, (BINS // 4, BINS // 4))
            self.reach *= 2
        bins = ((x.flatten() / self.reach + 1) * (BINS // 2)).long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)

    def occupied(self) -> tuple[Tensor, Tensor]:
        """The bins that hold something: the values at their middle and how many, both (B,) float64 on the CPU."""
        counts = self.counts.cpu()
        index = counts.nonzero().squeeze(1)
        middle = ((index + 0.5) / (BINS // 2) - 1) * self.reach
        return middle.double().clamp(self.low, self.high), counts[index].double()


def absmax_range(histogram: Histogram) -> tuple[float, float]:
    """Nothing is clipped; the same to both sides."""
    top = max(-histogram.low, histogram.high)
    return -top, top


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """From the (100 - percentile)-th to the percentile-th of all values seen; 100 is from the least to the greatest."""
    values, counts = histogram.occupied()
    if percentile == 100:
        return histogram.low, histogram.high
    below = counts.cumsum(0) / counts.sum()  # the share of values up to and including each bin
    share = torch.tensor([1 - percentile / 100, percentile / 100], dtype=torch.float64)
    low, high = values[torch.searchsorted(below, share).clamp_(max=len(values) - 1)].tolist()
    return low, high


def mse_range(histogram: Histogram) -> tuple[float, float]:
    """The range whose 256 codes stand for the values seen with the least squared error."""
    values, counts = histogram.occupied()
    values, counts = values.float(), counts.float()
    shares = torch.tensor(SHARES)
    lows = shares * histogram.low if histogram.low < 0 else torch.zeros(1)
    highs = shares * histogram.high if histogram.high > 0 else torch.zeros(1)
    best, best_error = (0.0, 0.0), math.inf
    for low in lows:
        scale, zero = (t[:, None] for t in scale_of_range(low.expand_as(highs), highs, 8, symmetric=False))
        codes = ((values / scale).round() + zero).clamp(-128, 127)  # (shares, B)
        errors = ((codes - zero) * scale - values).square() @ counts
        index = int(errors.argmin())
        if errors[index] < best_error:
            best_error, best = float(errors[index]), (float(low), float(highs[index]))
    return best
