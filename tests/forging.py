"""What may have happened to a tensor in a file, by chance or by intent."""

import random

import torch
from torch import Tensor


def damage(tensor: Tensor) -> Tensor:
    """Another type, another shape, or other values."""
    others = [torch.float32, torch.float16, torch.int8, torch.int64, torch.bool, torch.uint8, torch.float64]
    ways = [
        lambda: tensor.to(random.choice([d for d in others if d != tensor.dtype])),
        lambda: tensor.flatten()[: max(1, tensor.numel() - 1)].clone(),
        lambda: tensor[:0].clone(),
        lambda: tensor.flatten()[0].clone(),
        lambda: torch.zeros_like(tensor),
        lambda: torch.full_like(tensor, 2**30 if tensor.dtype in (torch.int32, torch.int64) else 100),
        lambda: -tensor,
        lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor.flip(0),
    ]
    return random.choice(ways)()
