"""What a layer may want to know of its inputs: running statistics over calibration tokens."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Tokens kept as they are, to measure the error of a layer's output on: enough for a stable ratio, little memory.
SAMPLE_TOKENS = 256
SAMPLE_TOKENS_PER_BATCH = 64


@dataclass
class Stats:
    """Statistics of the inputs of one layer.

    needs: which of "absmax", "second_moment" and "range" to collect (a sample of tokens always is).
    After `update`: tokens, absmax (K,) float32, second_moment (K, K) float32 (the mean of x^T x), range (the least
    and the greatest of all values), sample (S, K). After `update_drift` beside it, drift_moment and halves.
    """

    needs: frozenset[str] = frozenset({"absmax", "second_moment"})
    tokens: int = 0
    absmax: Tensor | None = None
    range: tuple[float, float] | None = None
    sample: Tensor | None = None
    # By half of the data: tokens, sums of x^T x, sums of (exact - x)^T x.
    _tokens_of: dict[int, int] = field(default_factory=dict, repr=False)
    _moment_sums: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _drift_sums: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def update(self, x: Tensor, half: int = 0) -> None:
        """Take in activations x (*, K), which belong to one half of the data (0 or 1). Raises ValueError on NaN or
        infinity."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if x.shape[0] == 0:
            return
        top = x.abs().amax(0)  # (K,)
        if not torch.isfinite(top).all():
            raise ValueError("the calibration data makes NaN or infinite activations here")
        self.tokens += x.shape[0]
        self._tokens_of[half] = self._tokens_of.get(half, 0) + x.shape[0]
        if "absmax" in self.needs:
            self.absmax = top if self.absmax is None else torch.maximum(self.absmax, top)
        if "second_moment" in self.needs:
            _sum_of(self._moment_sums, half, x).addmm_(x.t(), x)
        if "range" in self.needs:
            low, high = (v.item() for v in torch.aminmax(x))
            was_low, was_high = self.range or (low, high)
            self.range = min(was_low, low), max(was_high, high)
        self._keep_some(x)

    @torch.no_grad()
    def update_drift(self, exact: Tensor, x: Tensor, half: int = 0) -> None:
        """Take in activations x (*, K), after `update`, beside those that the float model has in their place."""
        exact, x = (t.detach().reshape(-1, t.shape[-1]).float() for t in (exact, x))
        _sum_of(self._drift_sums, half, x).addmm_((exact - x).t(), x)

    def drop_drift(self) -> None:
        """Forget what `update_drift` took in."""
        self._drift_sums.clear()

    def _keep_some(self, x: Tensor) -> None:
        have = 0 if self.sample is None else self.sample.shape[0]
        want = min(SAMPLE_TOKENS - have, SAMPLE_TOKENS_PER_BATCH, x.shape[0])
        if want > 0:
            # Evenly spread over the batch: neighbouring tokens are alike.
            rows = x[torch.linspace(0, x.shape[0] - 1, want, device=x.device).long()]
            self.sample = rows.clone() if self.sample is None else torch.cat((self.sample, rows))

    @property
    def second_moment(self) -> Tensor | None:
        return _total(self._moment_sums) / self.tokens if self._moment_sums else None

    @property
    def drifts(self) -> bool:
        """Whether the inputs were other than the float model's."""
        return any(drift.any().item() for drift in self._drift_sums.values())

    @property
    def drift_moment(self) -> Tensor | None:
        """(K, K) float32: the mean of (exact - x)^T x; None unless sequential calibration has both."""
        return _total(self._drift_sums) / self.tokens if self._drift_sums else None

    @property
    def halves(self) -> list[tuple[Tensor, Tensor, int]]:
        """The sums of x^T x and of (exact - x)^T x, and their tokens, of either half of the data; empty if one of them
        has no tokens. Sums, because their means would be four large matrices more."""
        if len(self._tokens_of) < 2 or not self._drift_sums:
            return []
        return [(self._moment_sums[half], self._drift_sums[half], n) for half, n in self._tokens_of.items()]


def _sum_of(sums: dict[int, Tensor], half: int, x: Tensor) -> Tensor:
    if half not in sums:
        sums[half] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    return sums[half]


def _total(sums: dict[int, Tensor]) -> Tensor:
    # Not sum(): it begins with 0, and so with a copy.
    return functools.reduce(torch.add, sums.values())
