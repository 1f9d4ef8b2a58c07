"""What the layers with int4 weights share: groups, smoothing, rotation, and the 16-bit low-rank branch.

    W'   = (W diag(s)) H         smoothed, padded to whole groups, rotated inside each
    U D  = the rank-r part of W' that leaves what 4 bits hold best
    R    = W' - U D              the residual, which a subclass rounds to int4

A subclass's Scheme has the options rank, group_size, rotate, svd and iterations; one that smooths sets smooth_factor
first.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..kernels import reference
from ..kernels.operands import HALF
from .algorithms.alternation import alternate
from .algorithms.rounding import round_to_groups
from .base import QuantLinear

Solver = Annotated[Literal["randomized", "exact"], Field(description="solver of the low-rank branch")]
Iterations = Annotated[
    int,
    Field(
        ge=0,
        le=100,
        description="turns at most of branch and residual, each made for what the other leaves; 0: the plain SVD",
    ),
]


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Raise ValueError for a branch of a higher rank than the weight has."""
    if rank > min(in_features, out_features):
        raise ValueError(
            f"rank {rank} is more than a {out_features} x {in_features} weight has: "
            f"choose rank <= {min(in_features, out_features)}"
        )


class Int4Linear(QuantLinear):
    """Kp is in_features rounded up to a multiple of the group size G, R the rank.

    qweight        (N, Kp // 2)  uint8, two int4 codes a byte, low nibble first
    smooth_factor  (K,)          float32, activations are divided by it; none without smoothing
    proj_down      (K, R)        bfloat16 or float16, applied to x as it comes; none with rank 0
    proj_up        (N, R)        likewise
    """

    needs = frozenset({"second_moment"})

    @property
    def group_size(self) -> int:
        return self.scheme.group_size

    @property
    def uses_zero_point(self) -> bool:
        """Whether a group of weights has a zero point."""
        return self.scheme.zero_point

    @property
    def padded_features(self) -> int:
        return -(-self.in_features // self.group_size) * self.group_size

    @property
    def half_dtype(self) -> torch.dtype:
        """The nominal type if that has 16 bits, else bfloat16: of the branch, and of what else is kept in 16 bits."""
        return self.dtype if self.dtype in HALF else torch.bfloat16

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, used=True) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if used else None)

    def _allocate(self, device: torch.device) -> None:
        n, k, s = self.out_features, self.in_features, self.scheme
        self._buffer("qweight", (n, self.padded_features // 2), torch.uint8, device)
        self._buffer("smooth_factor", (k,), torch.float32, device, False)
        self._buffer("proj_down", (k, s.rank), self.half_dtype, device, s.rank > 0)
        self._buffer("proj_up", (n, s.rank), self.half_dtype, device, s.rank > 0)

    def _residual(self, weight: Tensor) -> Tensor:
        """Fill proj_down and proj_up from a float weight (N, K); what is left for int4, (N, Kp) float32."""
        weight = weight.float()
        if self.smooth_factor is not None:
            weight = weight * self.smooth_factor
        weight = self._to_groups(weight)
        return self._split_off_branch(weight) if self.scheme.rank else weight

    def _to_groups(self, rows: Tensor) -> Tensor:
        """Pad the last dimension from K to Kp and rotate it."""
        rows = F.pad(rows, (0, self.padded_features - rows.shape[-1]))
        return reference.rotate_groups(rows, self.group_size) if self.scheme.rotate else rows

    def _split_off_branch(self, weight: Tensor) -> Tensor:
        """Fill proj_up and proj_down from the weight (N, Kp); return what is left of it."""
        s = self.scheme

        def rounded(rest: Tensor) -> Tensor:
            return round_to_groups(rest, self.group_size, self.uses_zero_point)

        up, down = alternate(weight, s.rank, s.svd, rounded, s.iterations)
        if self.scheme.rotate:
            down = reference.rotate_groups(down, self.group_size)  # back: H is its own inverse
        down = down[:, : self.in_features]
        if self.smooth_factor is not None:
            down = down / self.smooth_factor
        self.proj_up = up.to(self.proj_up.dtype)
        self.proj_down = down.t().contiguous().to(self.proj_down.dtype)
        # The residual is taken from the factors as they are stored, so that it makes up for their rounding.
        stored = self.proj_down.float().t()
        if self.smooth_factor is not None:
            stored = stored * self.smooth_factor
        return weight - self.proj_up.float() @ self._to_groups(stored)

    def _moment_in_groups(self, second_moment: Tensor) -> Tensor:
        """The second moment of x' = (x / s) H from that of x, (K, K) -> (Kp, Kp)."""
        if self.smooth_factor is not None:
            second_moment = second_moment / self.smooth_factor / self.smooth_factor[:, None]
        return self._to_groups(self._to_groups(second_moment).t().contiguous())
