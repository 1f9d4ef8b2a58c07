"""BitNet b1.58: every weight is -1, 0 or 1 times one scale, every activation an int8.

After Ma et al., "The Era of 1-bit LLMs" (arXiv 2402.17764). Two modules for the two lives of such a layer:

    BitLinear     to train: a float weight that is rounded in every forward; gradients pass straight through
    BitNetLinear  to run: two bits a weight and one exact integer product; `BitLinear.pack()` makes it

It is a format to train in. A weight that was not trained for it loses about half of itself.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..kernels import ops, reference
from ..kernels.operands import require_int32_sums
from ..kernels.packing import pack_ternary
from ..kernels.reference import TINY
from .base import QuantLinear, Scheme, check_weight, register
from .stats import Stats

LOSS = (
    "bitnet is a format to train in: a weight that was not trained for it loses about half of itself (relative error "
    "0.51 for Gaussian weights), and a model of such layers says nothing of use. Train it with qgraft.BitLinear, or "
    "take w4a16"
)


class BitNetScheme(Scheme):
    """No options: ternary weights with one scale, int8 activations with one scale per token."""

    def check_shape(self, in_features: int, out_features: int) -> None:
        require_int32_sums(in_features, 127)

    def note(self) -> str:
        return LOSS


def ternary_codes(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Ternary by mean absolute value: code = clamp(round(w / scale), -1, 1), scale = mean |w|.

    weight (N, K) float; each of the `groups` equal blocks of neighbouring rows has its own mean.
    Returns codes (N, K) float32 and scale (N,) float32.
    """
    weight = weight.float()
    means = weight.reshape(groups, -1).abs().mean(1).clamp_min(TINY)  # (groups,)
    scale = means.repeat_interleave(weight.shape[0] // groups)
    return (weight / scale[:, None]).round().clamp(-1, 1), scale


@register("bitnet")
class BitNetLinear(QuantLinear):
    """y = s_a scale sum_k q_a code + bias, with s_a = absmax / 127 of each token; y comes back in x's dtype.

    qweight  (N, Kp / 4)  uint8, four ternary codes a byte as :func:`.pack_ternary` makes them, Kp = K rounded up
    scale    (N,)         float32, the same for all rows that were scaled together

    `from_linear` warns: ternary weights by rounding are of no use to a model that was not trained with them.
    """

    Scheme = BitNetScheme

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme | None = None, **options) -> Self:
        layer = super().from_linear(linear, scheme, **options)
        warnings.warn(LOSS, stacklevel=2)
        return layer

    def _allocate(self, device: torch.device) -> None:
        n, k = self.out_features, self.in_features
        self.register_buffer("qweight", torch.zeros(n, -(-k // 4), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(n, dtype=torch.float32, device=device))

    def quantize(self, weight: Tensor, stats: Stats | None = None, groups: int = 1) -> None:
        """Fill the buffers; `groups` blocks of rows with a scale each. Statistics of the inputs are of no use here."""
        codes, self.scale = ternary_codes(weight, groups)
        self.qweight = pack_ternary(codes)

    def _linear(self, x: Tensor) -> Tensor:
        return ops.call(ops.bitnet_linear, x, self.qweight, self.scale, self.bias)

    def dequantize(self) -> Tensor:
        return reference.bitnet_dequantize(self.in_features, self.qweight, self.scale)


class _Ternary(torch.autograd.Function):
    """weight (N, K) -> its ternary values in its dtype; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, weight: Tensor, groups: int) -> Tensor:
        codes, scale = ternary_codes(weight, groups)
        return (codes * scale[:, None]).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _PerToken(torch.autograd.Function):
    """x (*, K) -> its int8 values, one scale per token, in its dtype; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        codes, steps = reference.w8a8_quantize(x, None, None)
        return (codes * steps).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class BitLinear(nn.Linear):
    """A linear layer to train ternary weights with: the signature of zeta's BitLinear, the arithmetic of BitNet b1.58.

    `weight` (N, K) stays a float parameter. Every forward rounds it and x as BitNetLinear does, and the gradients
    reach weight, x and bias as if nothing had been rounded (straight-through estimator). The output is that of
    `pack()`, up to the rounding of float sums.

    in_features, out_features: any sizes >= 1.
    groups: blocks of neighbouring output rows, each with its own scale, for projections that are fused into one.
    bias: none by default, as in BitNet and in zeta.
    Raises ValueError for sizes below 1, and for groups that do not divide out_features.

    There is no norm inside: BitNet's models have a norm before each such layer, and need it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int = 1,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer needs at least one feature on each side, got {in_features} -> {out_features}")
        BitNetScheme().check_shape(in_features, out_features)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or out_features % groups:
            raise ValueError(f"groups must be a whole number that divides out_features {out_features}, got {groups!r}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(*, K) -> (*, N); x in the weight's dtype, or under autocast."""
        return F.linear(_PerToken.apply(x), _Ternary.apply(self.weight, self.groups), self.bias)

    @torch.no_grad()
    def pack(self) -> BitNetLinear:
        """The layer to run: two bits a weight. The bias parameter is shared.

        Raises ValueError for a weight that is on meta or not finite.
        """
        check_weight(self.weight)
        layer = BitNetLinear(
            self.in_features, self.out_features, bias=False, device=self.weight.device, dtype=self.weight.dtype
        )
        layer.bias = self.bias
        layer.quantize(self.weight, groups=self.groups)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
