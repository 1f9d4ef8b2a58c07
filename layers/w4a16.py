"""W4A16: int4 weights in groups, 16-bit activations. A quarter of a 16-bit model, and any kernel that reads it is
bound by the bytes of its weights.

    w = scale * (code - zero_point)       per group of G neighbouring input features

A Hadamard rotation inside each group evens out what is to be rounded; the activations are rotated to match.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..kernels import ops, reference
from ..kernels.operands import HALF
from ..kernels.packing import pack_int4
from .algorithms import rounding
from .algorithms.gptq import gptq_int4
from .base import Scheme, register
from .int4 import Int4Linear, Iterations, Solver, check_rank
from .stats import Stats

# With one scale a row, rows are padded to whole 16 bytes.
CHANNEL_PADDING = 32


class W4A16Scheme(Scheme):
    """int4 weights, symmetric or with a zero point per group; activations in 16 bit."""

    group_size: Literal[32, 64, 128, "channel"] = Field(
        64, description="input features that share a scale, and the size of the rotation; channel: the whole row"
    )
    zero_point: bool = Field(False, description="a zero point for each group: a byte more, a closer fit")
    rotate: bool = Field(True, description="Hadamard rotation inside each group; not with group_size: channel")
    rounding: Literal["auto", "gptq", "rtn"] = Field(
        "auto", description="gptq needs calibration data; 'auto': gptq if there is any, else nearest"
    )
    rank: int = Field(0, ge=0, le=1024, description="rank of a 16-bit low-rank branch; 0: no branch")
    svd: Solver = "randomized"
    iterations: Iterations = 8

    @model_validator(mode="after")
    def _rotation_needs_groups(self) -> "W4A16Scheme":
        if self.rotate and self.group_size == "channel":
            raise ValueError("group_size: channel has no groups to rotate in; set rotate: false, or group_size: 128")
        return self

    def check_shape(self, in_features: int, out_features: int) -> None:
        check_rank(self.rank, in_features, out_features)

    def needs_data(self) -> str:
        if self.rounding == "gptq":
            return "rounding: gptq needs calibration data; give some, or set rounding: rtn"
        return ""


@register("w4a16")
class W4A16Linear(Int4Linear):
    """y = x' w^T + bias, plus the branch if there is one; y comes back in x's dtype. The buffers of Int4Linear, and

    scale       (N, Kp // G)  the layer's 16-bit type: that of the model, bfloat16 for a float32 one
    zero_point  (N, Kp // G)  int8 in [-8, 7]; none unless the scheme has zero_point

    float32 activations are rounded to the layer's 16-bit type; those that come in 16 bit stay as they are.
    """

    Scheme = W4A16Scheme

    @property
    def group_size(self) -> int:
        if self.scheme.group_size == "channel":
            return -(-self.in_features // CHANNEL_PADDING) * CHANNEL_PADDING
        return self.scheme.group_size

    def _allocate(self, device: torch.device) -> None:
        super()._allocate(device)
        shape = (self.out_features, self.padded_features // self.group_size)
        self._buffer("scale", shape, self.half_dtype, device)
        self._buffer("zero_point", shape, torch.int8, device, self.scheme.zero_point)

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        if stats is None and self.scheme.needs_data():
            raise ValueError(self.scheme.needs_data())
        g = self.group_size
        weight = self._residual(weight)  # (N, Kp)
        if self.scheme.zero_point:
            steps, self.zero_point = rounding.search_group_ranges(weight, g)
        else:
            steps = rounding.search_group_steps(weight, g)
        # Codes are made with the steps as they are stored. In float16 one may be too small or too large to be stored.
        dtype = torch.finfo(self.scale.dtype)
        self.scale = steps.clamp(dtype.smallest_normal * dtype.eps, dtype.max).to(self.scale.dtype)
        steps = self.scale.float()
        if stats is not None and self.scheme.rounding != "rtn":
            codes = gptq_int4(weight, steps, self._moment_in_groups(stats.second_moment), g, self.zero_point)
        else:
            zero = self.zero_point.repeat_interleave(g, 1) if self.scheme.zero_point else None
            codes = rounding.round_int4(weight, steps.repeat_interleave(g, 1), zero).to(torch.int8)
        self.qweight = pack_int4(codes)

    def _linear(self, x: Tensor) -> Tensor:
        act = x if x.dtype in HALF else x.to(self.half_dtype)
        y = ops.call(
            ops.w4a16_linear,
            act,
            self.qweight,
            self.scale,
            self.zero_point,
            None,
            self.proj_down,
            self.proj_up,
            self.bias,
            self.group_size,
            self.scheme.rotate,
        )
        return y if act is x else y.to(x.dtype)

    def dequantize(self) -> Tensor:
        return reference.w4a16_dequantize(
            self.in_features,
            self.qweight,
            self.scale,
            self.zero_point,
            None,
            self.proj_down,
            self.proj_up,
            self.group_size,
            self.scheme.rotate,
        )
