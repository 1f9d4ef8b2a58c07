"""Bytes of groups as layers have them: any integer, and with it any zero point whose 16 products are an int8."""

import torch

from qgraft.kernels.packing import pack_group_scale

# The largest integer, 16, which leaves the zero point 0 only.
LARGEST = 0x8F


def random_group_scale(n: int, groups: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """(n, groups) uint8."""
    integer = torch.randint(1, 17, (n, groups), device=device)
    # integer * (7 - zero) <= 127 and integer * (-8 - zero) >= -128
    low, high = (7 - 127 // integer).clamp(min=-8), (128 // integer - 8).clamp(max=7)
    zero = low + (torch.rand(n, groups, device=device) * (high - low + 1)).long().clamp(max=high - low)
    return pack_group_scale(integer, zero)
