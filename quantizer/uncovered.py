"""What of a model no rule reaches: parameters outside of its linear layers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..layers import is_fused, why_not_split

UNKNOWN_EXPERTS = "they are no linear layers, so no rule can reach them"


@dataclass(frozen=True)
class Uncovered:
    """Parameters of two or more dimensions that no rule can reach, or of an embedding that none names.

    reason: why fused experts cannot be split into linear layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    numel: int
    is_fused_experts: bool = False
    reason: str = ""


def find_uncovered(model: nn.Module, covered: list[nn.Module], untied: list[nn.Module]) -> tuple[Uncovered, ...]:
    """untied: layers whose weight stays behind with its other owner."""
    skip = {id(module) for module in untied}
    found, seen = [], {id(p) for module in covered for p in module.parameters(recurse=False)}
    for name, module in model.named_modules():
        if id(module) in skip:
            continue
        for leaf, p in module.named_parameters(recurse=False):
            if is_lazy(p) or p.ndim < 2 or id(p) in seen:
                continue
            seen.add(id(p))
            path, shape = f"{name}.{leaf}".lstrip("."), tuple(p.shape)
            # (1, ...) is a position or class embedding.
            experts = p.ndim == 3 and shape[0] > 1 and not isinstance(module, _ConvNd)
            reason = (why_not_split(module) if is_fused(module) else UNKNOWN_EXPERTS) if experts else ""
            found.append(Uncovered(path, type(module).__name__, shape, bytes_of(p), p.numel(), experts, reason))
    return tuple(found)


def distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each memory once: two parameters can share it without being one object."""
    found = {}
    for t in tensors:
        if not is_lazy(t):
            found.setdefault(id(t) if t.is_meta else t.data_ptr() or id(t), t)
    return list(found.values())


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
