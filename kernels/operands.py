"""What kernels ask of their operands before they read memory by address."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# One product of int4 codes times their group's integer with int8 ones is at most this.
FOLDED_PRODUCT = 127 * 128


def features_in_int32(product: int) -> int:
    """How many products of at most this size (as a number without sign) an int32 adds up exactly."""
    return (2**31 - 1) // product


def require_int32_sums(features: int, product: int, op: str = "") -> None:
    """ValueError if an int32 cannot hold the sum of so many products; features: padding included."""
    most = features_in_int32(product)
    if features > most:
        raise ValueError(
            f"{op}{': ' if op else ''}{features} input features: an int32 holds the products of {most} at most"
        )


def require_zero_points(op: str, act_zero_point: bool, two_level: bool, act_bits: int) -> None:
    """ValueError for a zero point of activations where there is none."""
    if act_zero_point and not (two_level and act_bits == 4):
        raise ValueError(f"{op}: act_zero_point is for activations of 4 bits with two-level scales")


def require_whole_groups(op: str, features: int, padded: int, group_size: int) -> None:
    """ValueError unless `padded` features are whole groups that hold `features`; group_size 0: neither is wanted."""
    if padded < features or (padded % group_size if group_size else padded != features):
        whole = f"a multiple of {group_size} and at least {features}" if group_size else str(features)
        raise ValueError(f"{op}: padded must be {whole}, got {padded}")


def require(
    op: str, x: Tensor, name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], *shape: int
) -> Tensor | None:
    """The tensor, contiguous. An error that can be read if it is not of the type, shape and device (that of x) that
    the kernel will take for granted."""
    if tensor is None:
        return None
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} and x on {x.device}")
    return tensor.contiguous()
