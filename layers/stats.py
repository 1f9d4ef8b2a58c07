"""What a layer may want to know of its inputs: running statistics over calibration tokens."""

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
    and the greatest of all values), sample (S, K).
    """

    needs: frozenset[str] = frozenset({"absmax", "second_moment"})
    tokens: int = 0
    absmax: Tensor | None = None
    range: tuple[float, float] | None = None
    sample: Tensor | None = None
    _moment_sum: Tensor | None = field(default=None, repr=False)
    _cross_sum: Tensor | None = field(default=None, repr=False)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in activations x (*, K). Raises ValueError on NaN or infinity."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if x.shape[0] == 0:
            return
        top = x.abs().amax(0)  # (K,)
        if not torch.isfinite(top).all():
            raise ValueError("the calibration data makes NaN or infinite activations here")
        self.tokens += x.shape[0]
        if "absmax" in self.needs:
            self.absmax = top if self.absmax is None else torch.maximum(self.absmax, top)
        if "second_moment" in self.needs:
            if self._moment_sum is None:
                self._moment_sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._moment_sum.addmm_(x.t(), x)
        if "range" in self.needs:
            low, high = (v.item() for v in torch.aminmax(x))
            was_low, was_high = self.range or (low, high)
            self.range = min(was_low, low), max(was_high, high)
        self._keep_some(x)

    @torch.no_grad()
    def update_cross(self, exact: Tensor, x: Tensor) -> None:
        """Take in activations x (*, K), after `update`, beside those that the float model has in their place."""
        exact, x = (t.detach().reshape(-1, t.shape[-1]).float() for t in (exact, x))
        if self._cross_sum is None:
            self._cross_sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._cross_sum.addmm_(exact.t(), x)

    def drop_cross(self) -> None:
        """Forget what `update_cross` took in."""
        self._cross_sum = None

    def _keep_some(self, x: Tensor) -> None:
        have = 0 if self.sample is None else self.sample.shape[0]
        want = min(SAMPLE_TOKENS - have, SAMPLE_TOKENS_PER_BATCH, x.shape[0])
        if want > 0:
            # Evenly spread over the batch: neighbouring tokens are alike.
            rows = x[torch.linspace(0, x.shape[0] - 1, want, device=x.device).long()]
            self.sample = rows.clone() if self.sample is None else torch.cat((self.sample, rows))

    @property
    def cross_moment(self) -> Tensor | None:
        """(K, K) float32: the mean of exact^T x; None unless sequential calibration has both."""
        return None if self._cross_sum is None else self._cross_sum / self.tokens

    @property
    def second_moment(self) -> Tensor | None:
        return None if self._moment_sum is None else self._moment_sum / self.tokens
