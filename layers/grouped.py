"""Weight-only layers that hold what other tools store: codes and scales in groups, exactly as they are in the file.

    w = scale * (code - zero_point) + offset      per group of G neighbouring input features

`w8a16` and `w4a16` are the everyday forms. These two are more general: `w8_group` has a scale for each group,
`w4_group` has scales of any float type and, for GGUF's Q4_1, a float added to each group; and both can have their
features sorted before they are grouped, as GPTQ with act-order does. Activations are multiplied in the type that they
come in, float32 too.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..functional import scale_of_range
from ..kernels import ops, reference
from ..kernels.packing import pack_int4
from .algorithms import rounding
from .base import QuantLinear, Scheme, register
from .stats import Stats

# With one scale a row, rows count as padded to whole units of the kernels.
CHANNEL_PADDING = 32


class GroupScheme(Scheme):
    """Options that both have."""

    group_size: Literal[32, 64, 128, 256, "channel"] = Field(
        32, description="input features that share a scale; channel: the whole row"
    )
    zero_point: bool = Field(False, description="a zero point for each group: a byte more, a closer fit")
    order: bool = Field(
        False,
        description="features are taken in an order that the layer stores, as checkpoints with act-order need it; a "
        "layer that is quantized here takes them as they come",
    )


class GroupLinear(QuantLinear):
    """G is the group size, Kp is in_features rounded up to whole groups.

    order  (K,)  int32, group j holds the features order[j G : (j + 1) G]; none unless the scheme has order
    """

    @property
    def group_size(self) -> int:
        if self.scheme.group_size == "channel":
            return -(-self.in_features // CHANNEL_PADDING) * CHANNEL_PADDING
        return self.scheme.group_size

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)

    def _allocate(self, device: torch.device) -> None:
        order = torch.arange(self.in_features, dtype=torch.int32, device=device) if self.scheme.order else None
        self.register_buffer("order", order)

    def _in_order(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(1, self.order)

    def _out_of_order(self, weight: Tensor) -> Tensor:
        """The columns of a weight (N, K) back where their features are."""
        return weight if self.order is None else weight[:, self.order.argsort()]

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        if self.order is not None:
            self.order = torch.arange(self.in_features, dtype=torch.int32, device=weight.device)
        self._round(F.pad(weight.float(), (0, self.groups * self.group_size - self.in_features)))

    def _round(self, weight: Tensor) -> None:
        """Fill codes and scales from a float32 weight, (N, Kp)."""
        raise NotImplementedError


class W8GroupScheme(GroupScheme):
    """int8 weights, symmetric or with a zero point per group."""


@register("w8_group")
class W8GroupLinear(GroupLinear):
    """y = x w^T + bias with w dequantized on the way; y comes back in x's dtype. `order` of GroupLinear, and

    qweight     (N, K)        int8
    scale       (N, Kp // G)  float32
    zero_point  (N, Kp // G)  int8; none unless the scheme has zero_point
    """

    Scheme = W8GroupScheme

    def _allocate(self, device: torch.device) -> None:
        shape = (self.out_features, self.groups)
        zero_point = torch.zeros(shape, dtype=torch.int8, device=device) if self.scheme.zero_point else None
        self.register_buffer(
            "qweight", torch.zeros(self.out_features, self.in_features, dtype=torch.int8, device=device)
        )
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", zero_point)
        super()._allocate(device)

    def _round(self, weight: Tensor) -> None:
        groups = weight.unflatten(1, (-1, self.group_size))  # (N, Kp // G, G)
        low, high = torch.aminmax(groups, dim=-1)
        self.scale, zero = scale_of_range(low, high, 8, symmetric=not self.scheme.zero_point)
        codes = (groups / self.scale[..., None]).round()
        if self.scheme.zero_point:
            self.zero_point = zero
            codes = codes + zero[..., None]
        self.qweight = codes.clamp(-128, 127).to(torch.int8).flatten(1)[:, : self.in_features].contiguous()

    def _linear(self, x: Tensor) -> Tensor:
        return ops.call(
            ops.w8_group_linear,
            self._in_order(x),
            self.qweight,
            self.scale,
            self.zero_point,
            self.bias,
            self.group_size,
        )

    def dequantize(self) -> Tensor:
        weight = reference.w8_group_dequantize(self.qweight, self.scale, self.zero_point, self.group_size)
        return self._out_of_order(weight)


class W4GroupScheme(GroupScheme):
    """int4 weights, symmetric, with a zero point per group, or with a float added to each group."""

    offset: bool = Field(False, description="a float32 added to all weights of a group; not with zero_point")
    scale_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what scales are stored in")

    def model_post_init(self, _: object) -> None:
        if self.offset and self.zero_point:
            raise ValueError("a group has either an offset or a zero_point: set one of them to false")


@register("w4_group")
class W4GroupLinear(GroupLinear):
    """y = x w^T + bias with w dequantized on the way; y comes back in x's dtype. `order` of GroupLinear, and

    qweight     (N, Kp // 2)  uint8, two int4 codes a byte, low nibble first
    scale       (N, Kp // G)  scale_dtype
    zero_point  (N, Kp // G)  int8 in [-8, 8]; none unless the scheme has zero_point
    offset      (N, Kp // G)  float32; none unless the scheme has offset
    """

    Scheme = W4GroupScheme

    def _allocate(self, device: torch.device) -> None:
        n, shape = self.out_features, (self.out_features, self.groups)
        zero_point = torch.zeros(shape, dtype=torch.int8, device=device) if self.scheme.zero_point else None
        offset = torch.zeros(shape, dtype=torch.float32, device=device) if self.scheme.offset else None
        packed = self.groups * self.group_size // 2
        self.register_buffer("qweight", torch.zeros(n, packed, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(shape, dtype=getattr(torch, self.scheme.scale_dtype), device=device))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("offset", offset)
        super()._allocate(device)

    def _round(self, weight: Tensor) -> None:
        g = self.group_size
        if self.scheme.offset:
            low, high = torch.aminmax(weight.unflatten(1, (-1, g)), dim=-1)
            self.offset = (low + high) / 2
            weight = weight - self.offset.repeat_interleave(g, 1)
        if self.scheme.zero_point:
            steps, self.zero_point = rounding.search_group_ranges(weight, g)
        else:
            steps = rounding.search_group_steps(weight, g)
        dtype = torch.finfo(self.scale.dtype)
        self.scale = steps.clamp(dtype.smallest_normal * dtype.eps, dtype.max).to(self.scale.dtype)
        zero = self.zero_point.repeat_interleave(g, 1) if self.scheme.zero_point else None
        codes = rounding.round_int4(weight, self.scale.float().repeat_interleave(g, 1), zero)
        self.qweight = pack_int4(codes.to(torch.int8))

    def _linear(self, x: Tensor) -> Tensor:
        x = self._in_order(x)
        if self.offset is None:
            return self._product(x, self.bias)
        sums = reference.group_sums(x, self.groups, self.group_size)
        y = torch.mm(sums, self.offset.t()) + self._product(x, None)
        return reference.add_bias(y, self.bias).to(x.dtype)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        codes = self.qweight, self.scale, self.zero_point
        return ops.call(ops.w4a16_linear, x, *codes, None, None, None, bias, self.group_size, False)

    def dequantize(self) -> Tensor:
        weight = reference.w4_residual(self.qweight, self.scale, self.zero_point, self.group_size)
        if self.offset is not None:
            weight = weight + self.offset.repeat_interleave(self.group_size, 1)
        return self._out_of_order(weight[:, : self.in_features])
