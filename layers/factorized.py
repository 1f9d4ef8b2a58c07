"""A linear layer as two thin ones: y = (x down^T) up^T + bias, in float or with both factors in int8.

    R (K + N) numbers instead of K N: smaller and faster below the rank K N / (K + N), and refused from there on.

Far behind quantization for the same bytes on most trained weights, whose singular values fall slowly; it is for
weights that really are of low rank, for the second half of a size that 8 bits alone do not reach, and as a start for
training. Both factors of `factorized` are parameters.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..kernels import ops, reference
from ..kernels.operands import HALF
from .algorithms import factorize
from .algorithms.rounding import quantize_rows_int8
from .base import QuantLinear, Scheme, Unsuitable, register
from .stats import Stats

DEFAULT_SHARE = 0.5


class FactorizedScheme(Scheme):
    """Two factors of the weight's own type. At most one of rank, share, energy and error."""

    rank: int | None = Field(None, ge=1, description="rank, by count")
    share: float | None = Field(
        None, gt=0, lt=1, description="rank, by the share of the weight's numbers that both factors may have together"
    )
    energy: float | None = Field(
        None, gt=0, lt=1, description="rank, by the share of the sum of squared singular values to keep"
    )
    error: float | None = Field(
        None, gt=0, lt=1, description="rank, by the relative error of the layer's output on the calibration data"
    )
    whiten: Literal["auto", "full", "diagonal", "none"] = Field(
        "auto",
        description="which error is least. full: that of the outputs; diagonal: that of the weight, each column by the "
        "size of its input; none: that of the weight; 'auto': full if there is calibration data",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "FactorizedScheme":
        given = [name for name in ("rank", "share", "energy", "error") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each choose the rank; give one of them")
        return self

    @property
    def adaptive(self) -> bool:
        """Whether the rank depends on the weight, so that only the work itself can tell it."""
        return self.energy is not None or self.error is not None

    def rank_for(self, in_features: int, out_features: int) -> int:
        """The rank of a layer of this shape; where only the weight can tell, the largest that it may get."""
        largest = factorize.largest_rank(in_features, out_features)
        if self.rank is not None or self.adaptive:
            return self.rank or largest
        share = DEFAULT_SHARE if self.share is None else self.share
        return max(1, int(share * in_features * out_features / (in_features + out_features)))

    def check_shape(self, in_features: int, out_features: int) -> None:
        largest = factorize.largest_rank(in_features, out_features)
        if largest == 0:
            raise ValueError(f"a {out_features} x {in_features} weight has no factors that are smaller than itself")
        if self.rank is not None and self.rank > largest:
            raise ValueError(
                f"rank {self.rank}: from rank {largest + 1} on, the factors of a {out_features} x {in_features} "
                f"weight are no smaller than itself; choose rank <= {largest}"
            )

    def needs_data(self) -> str:
        if self.error is not None:
            return "a rank by error needs calibration data; give some, or choose the rank by share or energy"
        if self.whiten in ("full", "diagonal"):
            return f"whiten: {self.whiten} needs calibration data; give some, or set whiten: none"
        return ""

    def note(self) -> str:
        if not self.adaptive:
            return ""
        how = "energy" if self.energy is not None else "error"
        return f"a rank by {how} is known only afterwards: the sizes shown for such layers are upper bounds"


class FactorizedBase(QuantLinear):
    """What both kinds share: which rank, which directions, and factors that fit each other."""

    Scheme = FactorizedScheme
    needs = frozenset({"second_moment"})

    @property
    def rank(self) -> int:
        return self.scheme.rank_for(self.in_features, self.out_features)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        """Fill both factors from a float weight (N, K). `scheme` then has the rank by count, whatever chose it.

        Raises Unsuitable if what was asked for takes a rank that makes nothing smaller.
        """
        if stats is None and self.scheme.needs_data():
            raise ValueError(self.scheme.needs_data())
        weight, moment = weight.float(), self._moment(stats)
        weighed = factorize.weigh(weight, moment)
        directions, squares = factorize.output_directions(weighed, None if self.scheme.adaptive else self.rank)
        rank = self._chosen_rank(weight, directions, squares, stats) if self.scheme.adaptive else self.rank
        self.scheme = self.scheme.model_copy(update={"rank": rank, "share": None, "energy": None, "error": None})
        down = directions[:, :rank].t() @ weight
        # Each direction's size in equal shares, so that neither factor is much larger: for float16, and for training.
        self._fill(weight, down / down.norm(dim=1, keepdim=True).sqrt().clamp_min(reference.TINY), moment)

    def _fill(self, weight: Tensor, down: Tensor, moment: Tensor | None) -> None:
        """Store down (R, K) and the up that goes with it as it is stored."""
        raise NotImplementedError

    def _moment(self, stats: Stats | None) -> Tensor | None:
        if stats is None or self.scheme.whiten == "none":
            return None
        moment = factorize.damped(stats.second_moment)
        return moment.diagonal() if self.scheme.whiten == "diagonal" else moment

    def _chosen_rank(self, weight: Tensor, directions: Tensor, squares: Tensor, stats: Stats | None) -> int:
        if self.scheme.energy is not None:
            wanted = f"{self.scheme.energy:g} of the energy"
            rank = factorize.rank_of_energy(squares, self.scheme.energy)
        else:
            wanted = f"an output error of {self.scheme.error:g}"
            kept, total = factorize.output_squares(directions, weight, stats.second_moment)
            rank = factorize.rank_of_error(kept, total, self.scheme.error) or directions.shape[1]
        largest = factorize.largest_rank(self.in_features, self.out_features)
        if rank > largest:
            raise Unsuitable(
                f"{wanted} takes rank {rank}, and from rank {largest + 1} on the factors of a {self.out_features} x "
                f"{self.in_features} weight are no smaller than itself"
            )
        return rank


@register("factorized")
class FactorizedLinear(FactorizedBase):
    """y = (x down^T) up^T + bias, both factors parameters: what trains the linear layer trains this one.

    down  (R, K)  the type of the weight
    up    (N, R)  likewise

    An x of another type is computed with in the wider of both, and y comes back in x's. Casting casts the factors.
    """

    def _allocate(self, device: torch.device) -> None:
        n, k, r = self.out_features, self.in_features, self.rank
        self.down = nn.Parameter(torch.zeros(r, k, dtype=self.dtype, device=device))
        self.up = nn.Parameter(torch.zeros(n, r, dtype=self.dtype, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme | None = None, **options) -> Self:
        layer = super().from_linear(linear, scheme, **options)
        for factor in (layer.down, layer.up):
            factor.requires_grad_(linear.weight.requires_grad)
        return layer

    def _fill(self, weight: Tensor, down: Tensor, moment: Tensor | None) -> None:
        self.down = nn.Parameter(down.to(self.dtype))
        self.up = nn.Parameter(factorize.refit(weight, self.down, moment).to(self.dtype))

    def _linear(self, x: Tensor) -> Tensor:
        if x.dtype == self.down.dtype:
            return F.linear(F.linear(x, self.down), self.up, self.bias)
        wide = torch.promote_types(x.dtype, self.down.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(F.linear(x.to(wide), self.down.to(wide)), self.up.to(wide), bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        return self.up.float() @ self.down.float()


@register("factorized_w8")
class FactorizedW8Linear(FactorizedBase):
    """y = (x down^T) up^T + bias with both factors in int8, one scale per row; y comes back in x's dtype.

    qdown       (R, K)  int8 in [-127, 127]
    down_scale  (R,)    float32
    qup         (N, R)  int8
    up_scale    (N,)    float32

    float32 activations are multiplied as in W8A32, 16-bit ones as in W8A16.
    """

    def _allocate(self, device: torch.device) -> None:
        n, k, r = self.out_features, self.in_features, self.rank
        self.register_buffer("qdown", torch.zeros(r, k, dtype=torch.int8, device=device))
        self.register_buffer("down_scale", torch.ones(r, dtype=torch.float32, device=device))
        self.register_buffer("qup", torch.zeros(n, r, dtype=torch.int8, device=device))
        self.register_buffer("up_scale", torch.ones(n, dtype=torch.float32, device=device))

    def _fill(self, weight: Tensor, down: Tensor, moment: Tensor | None) -> None:
        self.qdown, self.down_scale = quantize_rows_int8(down)
        up = factorize.refit(weight, reference.w8_dequantize(self.qdown, self.down_scale), moment)
        self.qup, self.up_scale = quantize_rows_int8(up)

    def _linear(self, x: Tensor) -> Tensor:
        if x.dtype in HALF:
            product, act = ops.w8a16_linear, x
        else:
            product, act = ops.w8a32_linear, x.float()
        return product(product(act, self.qdown, self.down_scale, None), self.qup, self.up_scale, self.bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        down, up = (reference.w8_dequantize(*f) for f in ((self.qdown, self.down_scale), (self.qup, self.up_scale)))
        return up @ down
