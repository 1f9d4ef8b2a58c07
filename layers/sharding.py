"""A part of a quantized layer: some of its outputs, or some of its inputs, with the very codes of the whole.

    columns   rows of the weight: y_r = x W_r^T
    rows      columns of the weight: y = sum over r of x_r W_r^T

Codes are sliced, never made again. A cut between inputs has to fall between groups, whose scale cannot be shared.

Where activations are quantized with one scale per token, that scale comes from the largest magnitude of the whole
token, and a part sees only its own features. `rows` then gives the layer one more group of features, whose weights are
all zero, for `with_largest` to put the largest magnitude of the whole token in: the scale, and with it every code,
comes out as in the whole layer, and no kernel has to know.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import reference
from ..kernels.packing import NO_GROUP
from .base import QuantLayer, QuantLinear
from .bitlinear import BitNetLinear
from .svdq import SVDQW4A4Linear
from .w8a8 import W8A8Linear, W8A8StaticLinear

# The dimension of each tensor that runs over outputs, and the one that runs over inputs, packed or in groups.
OUTPUTS = {
    **dict.fromkeys(("qweight", "scale", "zero_point", "group_scale", "offset", "bias"), 0),
    **dict.fromkeys(("proj_up", "up", "qup", "up_scale"), 0),
}
INPUTS = {
    **dict.fromkeys(("qweight", "group_scale", "offset", "down", "qdown"), 1),
    **dict.fromkeys(("smooth_factor", "proj_down"), 0),
    **dict.fromkeys(("scale", "zero_point"), 1),  # where they have it: else one number a row, for all inputs
}
# And those that run over neither. What is cut neither way is whole in every part.
KNOWN = {*OUTPUTS, *INPUTS, "down_scale", "act_scale", "act_zero_point", "order"}
# Features added beside the one that holds the largest magnitude, so that rows stay whole units of the kernels.
UNIT = 32
FOUR_TERNARY_ZEROS = 0b01010101


def why_not_columns(layer: QuantLinear, parts: int) -> str:
    """What keeps the layer from being cut between outputs into equal parts, or ""."""
    if why := _unknown(layer):
        return why
    if layer.out_features % parts:
        return f"its {layer.out_features} outputs cannot be cut into {parts} equal parts"
    return ""


def why_not_rows(layer: QuantLinear, parts: int) -> str:
    """What keeps the layer from being cut between inputs into equal parts of whole groups, or ""."""
    if why := _unknown(layer):
        return why
    if layer._buffers.get("order") is not None:
        return "its groups take the inputs in an order of their own (act-order): neighbours do not belong together"
    size = _group(layer)
    if layer.in_features % (parts * size):
        groups = f", in groups of {size}," if size > 1 else ""
        advice = "; choose a smaller group_size or fewer processes" if size > 1 else ""
        return f"its {layer.in_features} inputs{groups} cannot be cut into {parts} equal parts{advice}"
    return ""


def columns(layer: QuantLinear, part: int, parts: int) -> None:
    """Keep one of `parts` equal parts of the outputs, in place."""
    _cut(layer, OUTPUTS, part, parts)
    layer.out_features //= parts


def rows(layer: QuantLinear, part: int, parts: int, whole_token: bool = True) -> None:
    """Keep one of `parts` equal parts of the inputs, in place; the bias stays with the first.

    A layer that `needs_largest` gets some features more, for `with_largest`; without `whole_token` it does not, and
    takes the scale of what it sees of a token.
    """
    _cut(layer, INPUTS, part, parts)
    layer.in_features //= parts
    if part:
        layer.bias = None
    if whole_token and needs_largest(layer):
        _add_features(layer)


def needs_largest(layer: QuantLinear) -> bool:
    """Whether its activations have a scale that depends on the whole token."""
    if isinstance(layer, SVDQW4A4Linear):
        return layer.act_bits == 8 or layer.scheme.scales == "two_level"
    return isinstance(layer, BitNetLinear) or (
        isinstance(layer, W8A8Linear) and not isinstance(layer, W8A8StaticLinear)
    )


def largest(layer: QuantLinear, x: Tensor) -> Tensor:
    """The largest magnitude of each token in what a part of the layer, before it got more features, will round.

    x (*, K) -> (*, 1), float32 where x is smoothed or rotated first, else in x's dtype.
    """
    smooth, rotation = layer._buffers.get("smooth_factor"), _rotation(layer)
    x = x.detach()
    if smooth is not None or rotation:
        k = x.shape[-1]
        flat = x.reshape(-1, k).float()
        x = reference.smooth_and_rotate(flat, None if smooth is None else smooth[:k], k, rotation).reshape(x.shape)
    return x.abs().amax(-1, keepdim=True)


def with_largest(layer: QuantLinear, x: Tensor, value: Tensor) -> Tensor:
    """x (*, K) of a part, and the largest magnitude of the whole token, (*, 1) -> (*, K + the features added).

    In the type of `value`: after a rotation it is a float32, which 16 bits would round to another scale.
    """
    added = layer.in_features - x.shape[-1]
    if _rotation(layer):
        value = value * added**0.5  # H makes (value, value, ...) of (that, 0, 0, ...), and rounds nothing
    return torch.cat((x.to(value.dtype), F.pad(value, (0, added - 1))), -1)


def _unknown(layer: QuantLinear) -> str:
    if layer.tied_to:
        return "it shares its codes with an embedding"
    if getattr(layer, "stride", None) is not None:
        return "it stands in the place of a convolution"
    if not layer.__class__.__module__.startswith(QuantLayer.__module__.rpartition(".")[0]):
        return f"{type(layer).__name__} is a layer of your own, and only those of qgraft are known to be cut right"
    strange = [name for name, t in _tensors(layer).items() if t is not None and name not in KNOWN]
    return f"it is not known how to cut {', '.join(strange)}" if strange else ""


def _tensors(layer: QuantLinear) -> dict[str, Tensor | None]:
    return {**layer._parameters, **layer._buffers}


def _rotation(layer: QuantLinear) -> int:
    """Features that are rotated together; 0: none."""
    if isinstance(layer, W8A8Linear):
        return layer.rotation
    return layer.group_size if getattr(layer.scheme, "rotate", False) else 0


def _group(layer: QuantLinear) -> int:
    """Neighbouring inputs that have to stay together."""
    if isinstance(layer, BitNetLinear):
        return 4  # codes a byte
    size = getattr(layer.scheme, "group_size", None)
    return UNIT if size == "channel" else size or _rotation(layer) or 1


def _cut(layer: QuantLinear, dimensions: dict[str, int], part: int, parts: int) -> None:
    for name, tensor in _tensors(layer).items():
        dimension = dimensions.get(name)
        if tensor is None or dimension is None or tensor.ndim <= dimension:
            continue
        if dimensions is INPUTS and tensor.shape[dimension] == 1:
            continue  # one number a row, for all inputs
        mine = tensor.detach().chunk(parts, dimension)[part].clone()
        if name in layer._parameters:
            layer._parameters[name] = nn.Parameter(mine, requires_grad=tensor.requires_grad)
        else:
            layer._buffers[name] = mine


def _add_features(layer: QuantLinear) -> None:
    """A group of features more, whose weights are zero, and which is neither smoothed nor multiplied by the branch."""
    b, ones = layer._buffers, {"scale": 2, "smooth_factor": 1}
    added = layer.group_size if isinstance(layer, SVDQW4A4Linear) else _rotation(layer) or UNIT
    for name, dimensions in ones.items():
        if b.get(name) is not None and b[name].ndim == dimensions:
            b[name] = F.pad(b[name], (0, added if name == "smooth_factor" else 1), value=1)
    if b.get("group_scale") is not None:
        b["group_scale"] = F.pad(b["group_scale"], (0, 1), value=NO_GROUP)
    if b.get("proj_down") is not None:
        b["proj_down"] = F.pad(b["proj_down"], (0, 0, 0, added))
    if isinstance(layer, SVDQW4A4Linear):
        b["qweight"] = F.pad(b["qweight"], (0, added // 2))
    elif isinstance(layer, BitNetLinear):
        b["qweight"] = F.pad(b["qweight"], (0, added // 4), value=FOUR_TERNARY_ZEROS)
    else:
        zero = b["qweight"].new_zeros(layer.out_features) if b["zero_point"] is None else b["zero_point"]
        b["qweight"] = torch.cat((b["qweight"], zero[:, None].expand(-1, added)), 1)
    layer.in_features += added
