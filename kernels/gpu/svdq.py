"""SVDQ on a GPU: one kernel makes codes and the low-rank activations of x, a second one multiplies."""

from torch import Tensor

from .svdq_gemm import gemm
from .svdq_quantize import quantize


def svdq_quantize(
    x: Tensor,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    padded: int,
    group_size: int,
    rotate: bool,
    two_level: bool,
    act_bits: int,
    act_zero_point: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`qgraft.kernels.reference.svdq_quantize`."""
    return quantize(
        x, smooth_factor, proj_down, padded, group_size, rotate, two_level, act_bits, act_zero_point, planes=False
    )


def svdq_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rotate: bool,
    act_bits: int,
    act_zero_point: bool = False,
) -> Tensor:
    """See :func:`qgraft.kernels.reference.svdq_linear`."""
    codes, act_scale, lora_act = quantize(
        x,
        smooth_factor,
        proj_down if proj_up is not None else None,
        2 * qweight.shape[1],
        group_size,
        rotate,
        group_scale is not None,
        act_bits,
        act_zero_point,
        planes=True,
    )
    return gemm(codes, act_scale, lora_act, qweight, scale, group_scale, proj_up, bias, group_size, x.dtype)
