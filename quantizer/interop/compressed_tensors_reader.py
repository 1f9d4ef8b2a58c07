"""Layers of compressed-tensors checkpoints, as llm-compressor writes them, to ours; the format is in
compressed_tensors.py.

Weights of 2 to 8 bits with integers, by row or in groups, alone or with int8 or int4 activations.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.packing import pack_int4
from ...layers import QuantLinear, SVDQW4A4Linear, SVDQW4A8Linear, W8A8Linear, W8A8StaticLinear
from .compressed_tensors import INTEGERS, PACKED
from .compressed_tensors import settings as settings_of
from .foreign_config import CompressedTensors, Group, Numbers, checked
from .packed import unpack, words
from .stored import group_size_for, in_groups, weight_only

# What the names of schemes stand for in place of a group of settings: bits, group size, symmetric, activations.
PRESETS = {
    "W8A16": (8, 128, True, False),
    "W4A16": (4, 128, True, False),
    "W4A16_ASYM": (4, 128, False, False),
    "W8A8": (8, None, True, True),
    "INT8": (8, None, True, True),
}


class Reader:
    """What `foreign.load` asks of a format: which layers are quantized, what tensors they have, what they become."""

    def __init__(self, config: Mapping[str, Any]):
        """config: `quantization_config`. Raises ValueError for what cannot be read."""
        said = checked(CompressedTensors, config)
        for key, what in (
            ("kv_cache_scheme", "a quantized key-value cache"),
            ("transform_config", "rotations of the whole model"),
        ):
            if getattr(said, key):
                raise ValueError(f"it has {what} ({key}), which qgraft does not")
        if said.sparsity_config and said.sparsity_config.format != "dense":
            raise ValueError(f"its weights are sparse ({said.sparsity_config.format}), which qgraft's are not")
        if said.quantization_status != "compressed":
            raise ValueError(f"its quantization_status is {said.quantization_status!r}, not 'compressed'")
        if not said.config_groups:
            raise ValueError("it has no config_groups")
        self.ignore = said.ignore or []
        self.groups = [_group(name, group, said.format) for name, group in said.config_groups.items()]
        for pattern in (*self.ignore, *(target for group in self.groups for target in group["targets"])):
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    def settings(self, name: str, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
        """The group of a linear layer; None if it stays in float."""
        if any(_matches(name, pattern) for pattern in self.ignore):
            return None
        found = [group for group in self.groups if any(_matches(name, t) for t in group["targets"] if t != "Linear")]
        return next(iter(found or [group for group in self.groups if "Linear" in group["targets"]]), None)

    def expected(self, settings: dict[str, Any], shape: tuple[int, int], kinds: Mapping[str, Any]) -> dict[str, tuple]:
        """Shape and integer type (None: any float) of each tensor of a layer (N, K); `kinds` are those that it has."""
        n, k = shape
        weights, activations = settings["weights"], settings["input_activations"]
        bits, groups = weights["num_bits"], _groups(weights, k)
        rows = 1 if weights["strategy"] == "tensor" else n
        packed = settings["format"] == PACKED
        scale = (1,) if rows == 1 and len(kinds.get("weight_scale", ((),))[0]) == 1 else (rows, groups)
        if packed:
            tensors = {
                "weight_packed": ((n, words(k, bits)), torch.int32),
                "weight_shape": ((2,), torch.int64),
                "weight_scale": (scale, None),
            }
        else:
            tensors = {"weight": ((n, k), torch.int8), "weight_scale": (scale, None)}
        if not weights["symmetric"]:
            zero = ((words(n, bits), groups), torch.int32) if packed else (scale, torch.int8)
            tensors["weight_zero_point"] = zero
        reordered = weights["strategy"] == "group" and weights["actorder"] in (True, "group", "dynamic")
        if reordered or "weight_g_idx" in kinds:
            tensors["weight_g_idx"] = ((k,), torch.int32)
        if activations and not activations["dynamic"]:
            tensors["input_scale"] = ((1,), None)
            if not activations["symmetric"] or "input_zero_point" in kinds:
                tensors["input_zero_point"] = ((1,), torch.int8)
        return tensors

    def build(
        self, settings: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantLinear:
        """The layer, from its tensors (and a bias); ValueError for numbers that cannot be."""
        n, k = shape
        weights, activations = settings["weights"], settings["input_activations"]
        bits, groups = weights["num_bits"], _groups(weights, k)
        if settings["format"] == PACKED:
            if tensors["weight_shape"].tolist() != [n, k]:
                raise ValueError(f"weight_shape says {tensors['weight_shape'].tolist()}, the model {[n, k]}")
            codes = unpack(tensors["weight_packed"], bits, k)
            zero = tensors.get("weight_zero_point")
            zero = zero if zero is None else unpack(zero.t().contiguous(), bits, n).t().contiguous()
        else:
            codes, zero = tensors["weight"], tensors.get("weight_zero_point")
            zero = zero if zero is None else zero.reshape(-1, groups).expand(n, groups).contiguous()
        scale = tensors["weight_scale"].reshape(-1, groups).expand(n, groups).contiguous()
        bias = tensors.get("bias")
        if activations is None:
            order = None
            if "weight_g_idx" in tensors and weights["strategy"] == "group":
                codes, order = in_groups(codes, tensors["weight_g_idx"], weights["group_size"])
            size = weights["group_size"] if weights["strategy"] == "group" else None
            return weight_only(codes, scale, zero, size, bits, dtype, order=order, bias=bias)
        layer = _with_activations(settings, codes, scale, zero, dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(dtype))
        if not activations["dynamic"]:
            layer.act_scale = tensors["input_scale"].float().reshape(())
            zero = tensors.get("input_zero_point")
            layer.act_zero_point = torch.zeros((), dtype=torch.int8) if zero is None else zero.reshape(())
        return layer


def _with_activations(
    settings: dict[str, Any], codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> QuantLinear:
    (n, k), activations = codes.shape, settings["input_activations"]
    options = {"device": "meta", "dtype": dtype}
    if settings["weights"]["num_bits"] == 8:
        cls = W8A8Linear if activations["dynamic"] else W8A8StaticLinear
        layer = cls(k, n, False, zero_point=zero is not None, **options)
        layer.qweight, layer.scale = codes.contiguous(), scale.float().reshape(n)
        if zero is not None:
            layer.zero_point = zero.to(torch.int8).reshape(n)
        return layer
    size = group_size_for(settings["weights"]["group_size"])
    cls = SVDQW4A4Linear if activations["num_bits"] == 4 else SVDQW4A8Linear
    layer = cls(k, n, False, rank=0, group_size=size, smooth="none", rotate=False, scales="group", **options)
    layer.qweight = pack_int4(codes)
    layer.scale = scale.float().repeat_interleave(settings["weights"]["group_size"] // size, 1)
    return layer


def _groups(weights: dict[str, Any], k: int) -> int:
    return -(-k // weights["group_size"]) if weights["strategy"] == "group" else 1


def _matches(name: str, pattern: str) -> bool:
    """As compressed-tensors matches: "re:" and a regular expression for the beginning, or the name."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern in (name, "Linear")


def _group(name: str, group: list[str] | Group, file_format: str | None) -> dict[str, Any]:
    """A group with its defaults filled in; ValueError, naming the group, if its layers cannot be read."""
    where = f"config_groups.{name}"
    if isinstance(group, list):
        if name not in PRESETS:
            raise ValueError(
                f"config_groups: qgraft has no layer for the preset {name!r} (it has {', '.join(PRESETS)})"
            )
        bits, size, symmetric, activations = PRESETS[name]
        group = Group(
            targets=group,
            weights=Numbers(**settings_of(bits, "channel" if size is None else "group", size, symmetric=symmetric)),
            input_activations=Numbers(**settings_of(8, "token", None, True)) if activations else None,
        )
    if group.weights is None:
        raise ValueError(f"{where}: no weights are quantized, and nothing else can be read")
    weights = group.weights.model_dump()
    weights["strategy"] = weights["strategy"] or ("group" if (weights["group_size"] or 0) > 0 else "channel")
    activations = group.input_activations and group.input_activations.model_dump()
    form = group.format or file_format
    if form not in (PACKED, INTEGERS, "naive-quantized"):
        form = INTEGERS if activations and weights["num_bits"] == 8 else PACKED
    found = {
        "targets": group.targets,
        "format": PACKED if form == PACKED else INTEGERS,
        "weights": weights,
        "input_activations": activations,
    }
    _check(where, found, group)
    return found


def _check(where: str, group: dict[str, Any], written: Group) -> None:
    weights, activations = group["weights"], group["input_activations"]
    strategy = weights["strategy"]
    if weights["type"] != "int" or not 2 <= weights["num_bits"] <= 8:
        raise ValueError(
            f"{where}: weights of type {weights['type']} with {weights['num_bits']} bits; int of 2 to 8 can be read"
        )
    if strategy not in ("channel", "group", "tensor") or weights["dynamic"]:
        raise ValueError(f"{where}: weights scaled by {strategy!r}; channel, group and tensor can be read")
    if strategy == "group":
        try:
            group_size_for(weights["group_size"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
    if group["format"] == INTEGERS and (weights["num_bits"] != 8 or strategy == "group"):
        raise ValueError(f"{where}: {INTEGERS} can be read with 8 bits and one scale a row")
    if written.output_activations:
        raise ValueError(f"{where}: outputs are quantized (output_activations), which no layer of qgraft does")
    for target in group["targets"]:
        if target == "Embedding":
            raise ValueError(f"{where}: a quantized embedding; only linear layers can be read")
    if activations is None:
        return
    kind = weights["num_bits"], activations["num_bits"], activations["strategy"], bool(activations["dynamic"])
    known = {
        (8, 8, "token", True): strategy != "group",
        (8, 8, "tensor", False): strategy != "group",
        (4, 8, "token", True): strategy == "group" and weights["symmetric"],
        (4, 4, "group", True): strategy == "group"
        and weights["symmetric"]
        and activations["group_size"] == weights["group_size"] == group_size_for(weights["group_size"] or 1),
    }
    if not known.get(kind) or activations["type"] != "int" or not (activations["symmetric"] or not kind[3]):
        raise ValueError(
            f"{where}: weights of {kind[0]} bits by {strategy} with {'dynamic' if kind[3] else 'static'} activations "
            f"of {kind[1]} bits by {kind[2]}: no layer of qgraft computes that"
        )
