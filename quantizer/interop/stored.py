"""From codes, scales and zero points, however a file had them, to the layer that holds them exactly."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.operands import HALF
from ...kernels.packing import pack_int4
from ...layers import (
    QuantLinear,
    W4A16Linear,
    W4GroupLinear,
    W8A16Linear,
    W8A32Linear,
    W8GroupLinear,
)

# Group sizes that layers have; those of a file are cut into the largest of them that divides it.
GROUP_SIZES = (256, 128, 64, 32)


def group_size_for(size: int) -> int:
    """The layer's group size for a file's. Raises ValueError for one that 32 does not divide."""
    for ours in GROUP_SIZES:
        if size > 0 and size % ours == 0:
            return ours
    raise ValueError(f"groups of {size} features: only multiples of {GROUP_SIZES[-1]} can be held")


def weight_only(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int | None,
    bits: int,
    dtype: torch.dtype,
    *,
    offset: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
) -> QuantLinear:
    """w = scale * (code - zero_point) + offset, held exactly; codes of up to 4 bits in int4, others in int8.

    codes       (N, K)           int8, with a sign; columns in `order` if there is one
    scale       (N, groups)      any float type; zero_point, int8, and offset (4 bits only) likewise, or None
    group_size  of the file; None: one group a row
    order       (K,)             the feature that stands in each column
    dtype       the nominal type. A layer with a 16-bit one becomes w4a16 or w8a16 where these can hold it; in float32,
                whose activations are not to be rounded, w8a32 or the general w4_group and w8_group.
    """
    n, k = codes.shape
    size = "channel"
    if group_size is not None and group_size < k:
        size = group_size_for(group_size)
        if size != group_size:
            finer = -(-k // size)
            scale, zero_point, offset = (_finer(t, group_size // size, finer) for t in (scale, zero_point, offset))
    if zero_point is not None and not zero_point.any():
        zero_point = None
    options = {"device": "meta", "dtype": dtype}
    if bits <= 4:
        layer = _int4_layer(k, n, size, scale, zero_point, offset, order, options)
        layer.qweight = pack_int4(F.pad(codes, (0, 2 * layer.qweight.shape[1] - k)))
        layer.scale = scale.contiguous()
    elif size == "channel" and zero_point is None and order is None:
        layer = (W8A16Linear if dtype in HALF else W8A32Linear)(k, n, False, **options)
        layer.qweight, layer.scale = codes.contiguous(), scale.float().reshape(n)
    else:
        layer = W8GroupLinear(
            k, n, False, group_size=size, zero_point=zero_point is not None, order=order is not None, **options
        )
        layer.qweight, layer.scale = codes.contiguous(), scale.float().contiguous()
    if zero_point is not None:
        layer.zero_point = zero_point.to(torch.int8).contiguous()
    if offset is not None:
        layer.offset = offset.float().contiguous()
    if order is not None:
        layer.order = order.to(torch.int32)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype))
    return layer


def in_groups(codes: Tensor, g_idx: Tensor, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Sort the columns by their group: codes (N, K) and the order (K,), or None if they are sorted already.

    Raises ValueError if a group is not full, the last one apart: then no order makes the groups neighbours.
    """
    k = codes.shape[1]
    regular = torch.arange(k) // group_size
    if torch.equal(g_idx.long(), regular):
        return codes, None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order].long(), regular):
        raise ValueError(f"g_idx does not deal the features out in groups of {group_size}")
    return codes[:, order], order


def _finer(tensor: Tensor | None, times: int, groups: int) -> Tensor | None:
    return None if tensor is None else tensor.repeat_interleave(times, 1)[:, :groups]


def _int4_layer(
    k: int,
    n: int,
    size: int | str,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    order: Tensor | None,
    options: dict,
) -> QuantLinear:
    plain = order is None and offset is None and scale.dtype == options["dtype"] and size != 256
    if plain and options["dtype"] in HALF and (zero_point is None or zero_point.max() < 8):
        return W4A16Linear(k, n, False, group_size=size, zero_point=zero_point is not None, rotate=False, **options)
    return W4GroupLinear(
        k,
        n,
        False,
        group_size=size,
        zero_point=zero_point is not None,
        order=order is not None,
        offset=offset is not None,
        scale_dtype=str(scale.dtype).removeprefix("torch."),
        **options,
    )
