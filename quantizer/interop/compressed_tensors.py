"""Layers to the tensors and the config entries of compressed-tensors: what vLLM and transformers read.

    weight_packed      int32 (N, words)      codes as in `packed.py`; format "pack-quantized"
    weight             int8 (N, K)           instead, in format "int-quantized"
    weight_scale       float (N, 1) a row, (N, K / G) in groups, or (1,) for the whole weight
    weight_zero_point  with asymmetric codes: int32, packed along N; int8 (N, 1) in int-quantized
    weight_shape       int64 (2,)            N and K; pack-quantized only
    weight_g_idx       int32 (K,)            the group of each feature, in older checkpoints with act-order
    input_scale, input_zero_point            with static activations

    w = (code - zero_point) * weight_scale

The config has groups of layers, each with the same `weights` and `input_activations`. Format of the package
compressed-tensors 0.12 to 0.20 (Apache-2.0); nothing of it is needed here.
"""

from typing import Any

import torch
from torch import Tensor

from ...kernels.packing import unpack_group_scale, unpack_int4
from ...layers import (
    QuantLinear,
    SVDQW4A4Linear,
    W4A16Linear,
    W4GroupLinear,
    W8A8Linear,
    W8A8StaticLinear,
    W8A16Linear,
    W8A32Linear,
    W8GroupLinear,
)
from .packed import pack

PACKED, INTEGERS = "pack-quantized", "int-quantized"


def export_layer(layer: QuantLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer as the settings of its group (format, weights, input_activations) and its tensors, bias included.

    Raises ValueError, with the option to change, for what the format cannot say.
    """
    group, tensors = _export(layer)
    # Some readers multiply in the type of the scale: in 16 bits that would round the weights of a float32 model.
    scale = tensors["weight_scale"]
    tensors["weight_scale"] = scale.to(torch.promote_types(scale.dtype, layer.dtype))
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    return group, {name: tensor.contiguous() for name, tensor in tensors.items()}


def _export(layer: QuantLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    k = layer.in_features
    _plain(layer)
    if isinstance(layer, (W8A16Linear, W8A32Linear)):
        return _packed(layer.qweight, layer.scale[:, None], None, None, 8)
    if isinstance(layer, W8A8Linear):
        return _integers(layer)
    if getattr(layer, "order", None) is not None:
        raise ValueError("its features are ordered (act-order), which readers of compressed-tensors no longer take")
    if isinstance(layer, W8GroupLinear):
        size = _whole_groups(layer)
        return _packed(layer.qweight, layer.scale, layer.zero_point, size, 8)
    if isinstance(layer, W4GroupLinear) and layer.offset is not None:
        raise ValueError("a float is added to each of its groups (offset); quantize with zero_point: true instead")
    if isinstance(layer, (W4A16Linear, W4GroupLinear, SVDQW4A4Linear)):
        size, steps, zero = _whole_groups(layer), layer.scale, getattr(layer, "zero_point", None)
        if isinstance(layer, SVDQW4A4Linear) and layer.group_scale is not None:
            steps = layer.scale[:, None] * unpack_group_scale(layer.group_scale)[0]
            if layer.uses_zero_point:
                raise ValueError("its groups of weights have zero points, which no reader takes beside quantized "
                                 "activations; quantize with zero_point: false")  # fmt: skip
        if zero is not None and zero.max() > 7:
            raise ValueError("it has a zero point of 8, one more than four bits with a sign can say")
        group, tensors = _packed(unpack_int4(layer.qweight)[:, :k], steps, zero, size, 4)
        if isinstance(layer, SVDQW4A4Linear):
            token = layer.act_bits == 8
            strategy = ("token", None) if token else ("group", size)
            group["input_activations"] = settings(layer.act_bits, *strategy, dynamic=True)
        return group, tensors
    raise ValueError(f"compressed-tensors has no form for {type(layer).__name__}")


def _plain(layer: QuantLinear) -> None:
    """Raise ValueError, with all options to change, if the weight is not just codes and scales."""
    scheme, problems = layer.scheme, []
    if getattr(scheme, "rotate", False):
        recipe = {"w4a16": " (recipe w4a16_ct does)", "w8a8": " (recipe w8a8_ct does)"}.get(layer.scheme_name, "")
        problems.append(f"its groups are rotated; quantize with rotate: false{recipe}")
    if isinstance(layer, (W4A16Linear, SVDQW4A4Linear)) and scheme.rank:
        problems.append("it has a low-rank branch; quantize with rank: 0")
    if getattr(layer, "smooth_factor", None) is not None:
        problems.append("its activations are smoothed; quantize with smooth: none")
    if problems:
        raise ValueError(", and ".join(problems))


def _whole_groups(layer: QuantLinear) -> int | None:
    """The group size, None for one scale a row. Raises ValueError if the last group is short."""
    if layer.scheme.group_size == "channel":
        return None
    size, k = layer.group_size, layer.in_features
    if k % size:
        raise ValueError(f"groups of {size} do not divide its {k} input features; choose another group_size")
    return size


def _packed(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, size: int | None, bits: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = settings(bits, "channel" if size is None else "group", size, symmetric=zero_point is None)
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = pack(zero_point.t().contiguous(), bits).t()
    return {"format": PACKED, "weights": weights, "input_activations": None}, tensors


def _integers(layer: W8A8Linear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    weights = settings(8, "channel", None, symmetric=layer.zero_point is None)
    tensors = {"weight": layer.qweight, "weight_scale": layer.scale[:, None]}
    if layer.zero_point is not None:
        tensors["weight_zero_point"] = layer.zero_point[:, None]
    if not isinstance(layer, W8A8StaticLinear):
        return {"format": INTEGERS, "weights": weights, "input_activations": settings(8, "token", None, True)}, tensors
    tensors["input_scale"] = layer.act_scale.reshape(1)
    symmetric = layer.scheme.act_range == "absmax"
    if not symmetric:
        tensors["input_zero_point"] = layer.act_zero_point.reshape(1)
    activations = settings(8, "tensor", None, symmetric=symmetric)
    return {"format": INTEGERS, "weights": weights, "input_activations": activations}, tensors


def settings(bits: int, strategy: str, size: int | None, dynamic: bool = False, symmetric: bool = True) -> dict:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": size,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
