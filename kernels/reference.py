"""Every op in plain torch: the definition that all other backends are tested against.

Written to be read, and to be right on any device and dtype; speed is the business of `cpu/` and `gpu/`.
Shapes: M tokens, K input features, N output features, G group size, R rank; Kp is K rounded up to a multiple of G.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .operands import require_zero_points
from .packing import unpack_group_scale, unpack_int4, unpack_ternary

# A group's integer scale and an int4 code multiply to an int8: 16 * -8 = -128.
MAX_GROUP_SCALE = 16
# Symmetric, so that -x always quantizes to minus the code of x.
INT4_MAX = 7
INT8_MAX = 127
# Steps of a 4-bit activation from 0 to the largest of its group. The largest is rounded down to code 7, off by half a
# step as any other number may be, and all steps are 7 % finer than with 7: 0.25 dB less noise, for nothing.
ACT_STEPS = 7.5
# The same from the least to the largest of a group with a zero point: 16 codes that reach a quarter of a step less far.
ACT_SPAN = 15.5
# Below this a row counts as zero: its codes are 0 whatever it is divided by.
TINY = 1e-30


def w8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = (x @ qweight^T) * scale + bias, accumulated in float32; both W8A32 and W8A16.

    x (M, K) float; qweight (N, K) int8; scale (N,) float32; bias (N,) or None. Returns (M, N) in x's dtype.
    The scale comes after the sum in float32: a 16-bit accumulator of raw codes overflows at 65504.
    """
    y = (x.float() @ qweight.float().t()) * scale
    return add_bias(y, bias).to(x.dtype)


def w8_dequantize(qweight: Tensor, scale: Tensor) -> Tensor:
    """The effective weight, (N, K) float32."""
    return qweight.float() * scale[:, None]


def w8_group_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """y = x @ w^T + bias, w = scale * (code - zero_point) per group of neighbouring features, sums in float32.

    x (M, K) float; qweight (N, K) int8; scale (N, ceil(K / G)) float32; zero_point likewise, int8, or None for 0; bias
    (N,) or None. The last group of a row may be short. Returns (M, N) in x's dtype.
    """
    y = x.float() @ w8_group_dequantize(qweight, scale, zero_point, group_size).t()
    return add_bias(y, bias).to(x.dtype)


def w8_group_dequantize(qweight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """The effective weight, (N, K) float32."""
    k = qweight.shape[1]
    codes = qweight.float()
    if zero_point is not None:
        codes = codes - zero_point.repeat_interleave(group_size, 1)[:, :k]
    return codes * scale.repeat_interleave(group_size, 1)[:, :k]


def group_sums(x: Tensor, groups: int, group_size: int) -> Tensor:
    """What each group of features adds up to, (M, K) -> (M, groups) float32: what a constant per group multiplies."""
    return F.pad(x.float(), (0, groups * group_size - x.shape[1])).unflatten(1, (groups, group_size)).sum(-1)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def w8a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    bias: Tensor | None,
    smooth_factor: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """y = s_a * scale * sum_k (qa - za) (qweight - zero_point) + bias, the integer sum exact.

    x (M, K) float; qweight (N, Kp) int8; scale (N,) float32; zero_point (N,) int8, or None for 0; bias (N,) or None.
    The codes qa and their s_a and za come from :func:`w8a8_quantize`, of x or of what is made of it: divided by
    smooth_factor (K,) float32, and padded to Kp and rotated in groups of `rotation` features, a power of two. Without
    rotation (0) Kp is K. Returns (M, N) in x's dtype.
    """
    changed = smooth_and_rotate(x.float(), smooth_factor, qweight.shape[1], rotation)
    codes, steps = w8a8_quantize(changed, act_scale, act_zero_point)
    act, weight = codes.double(), qweight.double()  # float64 holds every sum of K < 2^37 products
    if act_zero_point is not None:
        act = act - act_zero_point
    if zero_point is not None:
        weight = weight - zero_point[:, None]
    y = (act @ weight.t()) * steps * scale
    return add_bias(y, bias).to(x.dtype)


def w8a8_quantize(x: Tensor, act_scale: Tensor | None, act_zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Activations x (M, K) float -> codes (M, K) int8 and their scale, float32.

    act_scale None, dynamic: one scale a token, (M, 1), absmax / 127; codes in [-127, 127], zero point 0.
    act_scale 0-dim float32 and act_zero_point 0-dim int8, static: codes round(x / act_scale) + act_zero_point,
    clamped to [-128, 127]; the scale comes back for each token, (M, 1), NaN for a token with NaN in it.
    """
    x = x.float()
    if act_scale is None:
        steps = (x.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(TINY)  # (M, 1)
        return (x / steps).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), steps
    steps = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, act_scale)
    codes = (x / act_scale).round()
    if act_zero_point is not None:
        codes = codes + act_zero_point
    return codes.clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8), steps


def w8a8_dequantize(
    in_features: int,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth_factor: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """The effective weight seen from raw x, (N, K) float32: scale * (code - zero_point), rotated back, unsmoothed."""
    codes = qweight.float()
    weight = (codes if zero_point is None else codes - zero_point[:, None]) * scale[:, None]
    return _seen_from_raw_x(weight, in_features, smooth_factor, None, None, rotation, rotation > 0)


def bitnet_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = s_a * scale * sum_k qa code + bias, the integer sum exact.

    x (M, K) float; qweight (N, Kp / 4) uint8, ternary codes as :func:`.packing.pack_ternary` makes them, Kp = K
    rounded up to a multiple of 4; scale (N,) float32; bias (N,) or None. The codes qa of x and their scale s_a are
    those of :func:`w8a8_quantize`, one scale a token. Returns (M, N) in x's dtype.
    """
    codes, steps = w8a8_quantize(x, None, None)
    weight = unpack_ternary(qweight)[:, : x.shape[1]]
    y = (codes.double() @ weight.double().t()) * steps * scale
    return add_bias(y, bias).to(x.dtype)


def bitnet_dequantize(in_features: int, qweight: Tensor, scale: Tensor) -> Tensor:
    """The effective weight, (N, K) float32."""
    return unpack_ternary(qweight)[:, :in_features].float() * scale[:, None]


def hadamard(n: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal Sylvester Hadamard matrix, (n, n) float32, n a power of two; symmetric, its own inverse.

    Entry (i, j) is (-1)^popcount(i & j) / sqrt(n).
    """
    index = torch.arange(n, device=device)
    both = index[:, None] & index[None, :]
    for shift in (8, 4, 2, 1):  # fold the bits: the lowest one becomes the parity, for n <= 65536
        both = both ^ (both >> shift)
    return (1 - 2 * (both & 1)).float() / n**0.5


def rotate_groups(x: Tensor, group_size: int) -> Tensor:
    """Multiply every group of the last dimension by the Hadamard matrix of its size; (..., Kp) -> (..., Kp)."""
    return (x.unflatten(-1, (-1, group_size)) @ hadamard(group_size, x.device).to(x.dtype)).flatten(-2)


def smooth_and_rotate(x: Tensor, smooth_factor: Tensor | None, padded: int, rotation: int) -> Tensor:
    """x' = (x / s) H: x (M, K) float32 divided by s (K,), padded to (M, padded), rotated in groups of `rotation`."""
    if smooth_factor is not None:
        x = x / smooth_factor
    x = F.pad(x, (0, padded - x.shape[-1]))
    return rotate_groups(x, rotation) if rotation else x


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
    """Quantize activations and project them down, the two readers of x in one place.

    x (M, K) float; smooth_factor (K,) float32, x is divided by it; proj_down (K, R), applied to x as it comes.
    Returns
      codes    (M, Kp) int8
      scale    float32: (M, Kp // G) for group scales, (M, 1) for two-level or 8-bit ones
      lora_act (M, R) float32

    Four bits, group scales: codes in [-7, 7], x' ~ codes * scale of the group.
    Four bits, two-level: a float per token times an integer a = 1..16 per group; the codes returned are the folded
    ones, a * code in [-112, 112], so that x' ~ codes * scale of the token and one int8 product does the whole row.
    The integer is rounded to nearest (a little clipping costs less than coarser steps), and the largest magnitude is
    7.5 steps (ACT_STEPS), not 7.
    Four bits, two-level, act_zero_point: 16 codes from about the least to about the largest of each group, as whole
    steps from 0: the folded ones are a * (code - zero_point), in [-126, 126], and cost the product nothing.
    Eight bits: one float per token, codes in [-127, 127].

    Raises ValueError for act_zero_point where it means nothing: with eight bits, or a float scale per group.
    """
    require_zero_points("svdq_quantize", act_zero_point, two_level, act_bits)
    x = x.float()
    lora_act = x @ proj_down.float() if proj_down is not None else x.new_zeros(x.shape[0], 0)
    x = smooth_and_rotate(x, smooth_factor, padded, group_size if rotate else 0)
    if act_bits == 8:
        scale = (x.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(TINY)  # (M, 1)
        return (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale, lora_act
    groups = x.unflatten(-1, (-1, group_size))  # (M, Kp // G, G)
    absmax = groups.abs().amax(-1, keepdim=True)  # (M, Kp // G, 1)
    if not two_level:
        scale = (absmax / INT4_MAX).clamp_min(TINY)
        codes = (groups / scale).round().clamp(-INT4_MAX, INT4_MAX)
        return codes.flatten(-2).to(torch.int8), scale.squeeze(-1), lora_act
    token_scale = (absmax.amax(1, keepdim=True) / (ACT_STEPS * MAX_GROUP_SCALE)).clamp_min(TINY)  # (M, 1, 1)
    if act_zero_point:
        least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        integer = ((largest - least) / (ACT_SPAN * token_scale)).round().clamp(1, MAX_GROUP_SCALE)
        step = integer * token_scale
        first = ((largest + least) / (2 * step) - 7.5).round()  # minus the zero point
        codes = torch.minimum(torch.maximum((groups / step).round(), first), first + 15) * integer
        return codes.flatten(-2).to(torch.int8), token_scale.squeeze(-1), lora_act
    integer = (absmax / (ACT_STEPS * token_scale)).round().clamp(1, MAX_GROUP_SCALE)
    codes = (groups / (integer * token_scale)).round().clamp(-INT4_MAX, INT4_MAX) * integer
    return codes.flatten(-2).to(torch.int8), token_scale.squeeze(-1), lora_act


def fold(codes: Tensor, group_scale: Tensor, group_size: int) -> Tensor:
    """Codes (N, Kp) int8 less the zero points of their groups, times their integers: (N, Kp) int16."""
    integer, zero_point = (part[..., None] for part in unpack_group_scale(group_scale))
    return ((codes.unflatten(-1, (-1, group_size)).short() - zero_point) * integer).flatten(-2)


def svdq_gemm(
    codes: Tensor,
    act_scale: Tensor,
    lora_act: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = dequantized(codes) @ dequantized(qweight)^T + lora_act @ proj_up^T + bias, (M, N) in out_dtype.

    codes (M, Kp) int8 and act_scale (M, Kp // G) or (M, 1) and lora_act (M, R) as from :func:`svdq_quantize`;
    qweight (N, Kp // 2) uint8; proj_up (N, R). Two-level: scale (N,) float32 and group_scale (N, Kp // G) uint8,
    integers and zero points as :func:`.packing.pack_group_scale` makes them. Group scales: scale (N, Kp // G) float32
    and no group_scale. Integer sums are exact (float64 holds them).
    """
    weight = unpack_int4(qweight)  # (N, Kp)
    if group_scale is not None:
        folded = fold(weight, group_scale, group_size).double()
        y = (codes.double() @ folded.t()) * act_scale * scale
    else:
        act = codes.unflatten(-1, (-1, group_size)).double() * act_scale[..., None]
        y = act.flatten(-2) @ (weight.unflatten(-1, (-1, group_size)).double() * scale[..., None]).flatten(-2).t()
    if proj_up is not None:
        y = y + lora_act.double() @ proj_up.double().t()
    return add_bias(y, bias).to(out_dtype)


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
    """The whole layer: :func:`svdq_quantize` then :func:`svdq_gemm`. x (M, K) -> (M, N) in x's dtype."""
    codes, act_scale, lora_act = svdq_quantize(
        x,
        smooth_factor,
        proj_down,
        2 * qweight.shape[1],
        group_size,
        rotate,
        group_scale is not None,
        act_bits,
        act_zero_point,
    )
    return svdq_gemm(codes, act_scale, lora_act, qweight, scale, group_scale, proj_up, bias, group_size, x.dtype)


def svdq_residual(qweight: Tensor, scale: Tensor, group_scale: Tensor | None, group_size: int) -> Tensor:
    """The dequantized residual in its own (smoothed, rotated, padded) basis, (N, Kp) float32."""
    if group_scale is None:
        return w4_residual(qweight, scale, None, group_size)
    integer, zero_point = unpack_group_scale(group_scale)
    return w4_residual(qweight, scale[:, None] * integer, zero_point, group_size)


def svdq_dequantize(
    in_features: int,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    group_size: int,
    rotate: bool,
) -> Tensor:
    """The effective weight of the layer seen from raw x, (N, K) float32: what gradients flow through."""
    weight = svdq_residual(qweight, scale, group_scale, group_size)
    return _seen_from_raw_x(weight, in_features, smooth_factor, proj_down, proj_up, group_size, rotate)


def _seen_from_raw_x(
    weight: Tensor,
    in_features: int,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    group_size: int,
    rotate: bool,
) -> Tensor:
    """A smoothed, rotated, padded weight (N, Kp) and its branch as the one (N, K) that x multiplies."""
    if rotate:
        weight = rotate_groups(weight, group_size)  # H is symmetric: R H^T = R H
    weight = weight[:, :in_features]
    if smooth_factor is not None:
        weight = weight / smooth_factor
    if proj_up is not None and proj_down is not None:
        weight = weight + proj_up.float() @ proj_down.float().t()
    return weight


def w4a16_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rotate: bool,
) -> Tensor:
    """y = x' w^T + (x @ proj_down) @ proj_up^T + bias, w = scale * (code - zero_point), sums in float32.

    x (M, K) float; qweight (N, Kp // 2) uint8; scale (N, Kp // G) float; zero_point (N, Kp // G) int8 in [-8, 7], or
    None for 0; smooth_factor (K,) float32; proj_down (K, R), proj_up (N, R). One scale a row is group_size = Kp.
    x' = x / smooth_factor, padded to Kp, rotated in each group, and rounded to x's dtype, in which a matrix unit
    takes it. Returns (M, N) in x's dtype.
    """
    act = x.float()
    y = 0.0 if proj_down is None or proj_up is None else (act @ proj_down.float()) @ proj_up.float().t()
    act = smooth_and_rotate(act, smooth_factor, 2 * qweight.shape[1], group_size if rotate else 0)
    act = act.to(x.dtype).float()
    y = y + act @ w4_residual(qweight, scale, zero_point, group_size).t()
    return add_bias(y, bias).to(x.dtype)


def w4_residual(qweight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """The dequantized codes in their own (smoothed, rotated, padded) basis, (N, Kp) float32."""
    codes = unpack_int4(qweight).unflatten(-1, (-1, group_size)).float()  # (N, Kp // G, G)
    if zero_point is not None:
        codes = codes - zero_point[..., None]
    return (codes * scale.float()[..., None]).flatten(-2)


def w4a16_dequantize(
    in_features: int,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    group_size: int,
    rotate: bool,
) -> Tensor:
    """The effective weight of the layer seen from raw x, (N, K) float32: what gradients flow through."""
    weight = w4_residual(qweight, scale, zero_point, group_size)
    return _seen_from_raw_x(weight, in_features, smooth_factor, proj_down, proj_up, group_size, rotate)
