"""SVDQuant int4 layers as nunchaku and diffusers' `nunchaku_lite` store them: one layer in, one layer out.

    layer = import_layer({"qweight": ..., "wscales": ..., ...})      row-major, runs on any device
    tensors = export_layer(layer)                                    back in tiles, bit for bit

What a file holds for a layer of N outputs and K inputs, both padded to multiples of 128, G = 64, in tiles (see
kernels/nunchaku_layout.py):

    qweight        (N, K / 2)   int8, two int4 codes a byte
    wscales        (K / 64, N)  bfloat16 or float16
    smooth_factor  (K,)         x is divided by it; in older files `smooth`
    proj_down      (K, R)       multiplies x as it comes, before the division; in older files `lora_down`
    proj_up        (N, R)       in older files `lora_up`
    bias           (N,)

and `smooth_orig` or `smooth_factor_orig`, which no kernel reads and which is dropped. y = Q(x / smooth) W^T +
(x proj_down) proj_up^T + bias: the conventions of :class:`SVDQW4A4Linear` without rotation.

Not in the tensors: nunchaku runs the layer after a GELU on x + 0.171875, GELU's lower bound, whose codes are then
unsigned, and its bias makes up for the shift (`input_shift` below). Whole files: interop/nunchaku_models.py.
"""

import torch
from torch import Tensor, nn

from ...kernels import nunchaku_layout as layout
from ...kernels.operands import HALF
from ...kernels.packing import pack_int4, unpack_int4
from ...layers import SVDQW4A4Linear, SVDQW4A8Linear, W4A16Linear

# The lower bound of GELU, rounded up to 16 bits; deepcompressor's constant.
GELU_SHIFT = 0.171875
OLD_NAMES = {"smooth": "smooth_factor", "lora_down": "proj_down", "lora_up": "proj_up"}
UNUSED = ("smooth_orig", "smooth_factor_orig")
NVFP4_ONLY = ("wcscales", "wtscale")
SVDQ = frozenset({"qweight", "wscales", "smooth_factor", "proj_down", "proj_up"})
AWQ = frozenset({"qweight", "wscales", "wzeros"})


def import_layer(
    tensors: dict[str, Tensor], shape: tuple[int, int] | None = None, input_shift: float = 0.0
) -> SVDQW4A4Linear:
    """A layer of ours from the tensors of one SVDQ layer, old or new names, on their device.

    shape: the layer's (N, K), where the file pads them to multiples of 128; nothing but zeros may be cut off.
    input_shift: what nunchaku adds to x, `GELU_SHIFT` after a GELU. The layer then takes x as it comes: the shift is
    moved into the bias, exactly up to the bias's rounding. Unsigned codes are not ours, and signed ones would lose
    a bit, so that it becomes a `SVDQW4A8Linear`.
    Raises ValueError for what is missing, of another shape or type, NVFP4, or no sensible number.
    """
    twice = sorted(new for old, new in OLD_NAMES.items() if old in tensors and new in tensors)
    if twice:
        raise ValueError(f"{', '.join(twice)}: there under the old name and the new one")
    tensors = {OLD_NAMES.get(name, name): t for name, t in tensors.items() if name not in UNUSED}
    codes, scale, smooth, down, up, bias = _row_major(tensors)
    (n, k), (rows, columns) = codes.shape, shape or codes.shape
    if rows > n or columns > k or n - rows >= layout.TILE or k - columns >= layout.TILE:
        raise ValueError(f"a {rows} x {columns} layer, padded to multiples of 128, is not {n} x {k}")
    cut = [codes[rows:], codes[:, columns:], up[rows:], down[columns:], *([] if bias is None else [bias[rows:]])]
    if any(part.count_nonzero() for part in cut):
        raise ValueError(f"the file holds a {n} x {k} layer: what a {rows} x {columns} one would cut off is not zero")
    groups = -(-columns // layout.GROUP)
    codes, scale, smooth = codes[:rows, : groups * layout.GROUP], scale[:rows, :groups], smooth[:columns]
    _check_positive("smooth_factor", smooth)
    if not torch.isfinite(scale).all():
        raise ValueError("wscales has NaN or infinite values")
    cls = SVDQW4A8Linear if input_shift else SVDQW4A4Linear
    layer = cls(
        columns, rows, bias=False, rank=up.shape[1], group_size=layout.GROUP, rotate=False, scales="group_half",
        device=codes.device, dtype=down.dtype,
    )  # fmt: skip
    layer.qweight = pack_int4(codes)
    layer.scale, layer.smooth_factor = scale.float().contiguous(), smooth.float().contiguous()
    if up.shape[1]:
        layer.proj_down, layer.proj_up = down[:columns].contiguous(), up[:rows].contiguous()
    if input_shift:
        zero = torch.zeros(rows, device=codes.device) if bias is None else bias[:rows]
        bias = (zero.double() + input_shift * residual(layer).sum(1)).to(down.dtype)
    if bias is not None:
        layer.bias = nn.Parameter(bias[:rows].contiguous(), requires_grad=False)
    return layer


def residual(layer: SVDQW4A4Linear) -> Tensor:
    """The int4 part of the weight seen from x as it comes, without the branch; (N, K) float64, no rotation."""
    codes = unpack_int4(layer.qweight).unflatten(1, (-1, layer.group_size)).double()
    return (codes * layer.scale[..., None].double()).flatten(1)[:, : layer.in_features] / layer.smooth_factor.double()


def export_layer(layer: SVDQW4A4Linear, rank: int | None = None) -> dict[str, Tensor]:
    """The inverse of :func:`import_layer`, new names; every number as it is in the layer.

    rank: pad the branch with zeros to this multiple of 16; by default to the next one, at least 16.
    Raises ValueError for what the format cannot hold, and says which option of the recipe makes it fit.
    """
    problem = why_not_exported(layer)
    if problem:
        raise ValueError(problem)
    dtype, own = layer.half_dtype, layer.scheme.rank
    rank = export_rank(layer) if rank is None else rank
    if rank < own or rank % layout.RANK_TILE:
        raise ValueError(f"a branch of rank {own} cannot be padded to rank {rank}: 16 must divide it")
    smooth = layer.smooth_factor
    if smooth is None:
        smooth = torch.ones(layer.in_features, device=layer.qweight.device)
    down, up = (
        torch.zeros(size, rank, dtype=dtype, device=layer.qweight.device)
        for size in (layer.in_features, layer.out_features)
    )
    if own:
        down[:, :own], up[:, :own] = layer.proj_down, layer.proj_up
    tensors = {
        "qweight": layout.tile_codes(unpack_int4(layer.qweight)),
        "wscales": layout.tile_scales(layer.scale.to(dtype)),
        "smooth_factor": layout.tile_vector(smooth.to(dtype)),
        "proj_down": layout.tile_down(down),
        "proj_up": layout.tile_up(up),
    }
    if layer.bias is not None:
        tensors["bias"] = layout.tile_vector(layer.bias.detach().to(dtype))
    return tensors


def export_rank(layer: SVDQW4A4Linear) -> int:
    """The rank that its branch has in a file: the next multiple of 16, at least 16."""
    return max(-(-layer.scheme.rank // layout.RANK_TILE), 1) * layout.RANK_TILE


def why_not_exported(layer: nn.Module) -> str:
    """What keeps a layer from being exported, in words; "" if nothing does."""
    if type(layer) is not SVDQW4A4Linear:
        return f"nunchaku has no layer like {type(layer).__name__}, only w4a4_svd"
    if layer.stride is not None:
        return "nunchaku_lite replaces nn.Linear only, and this is a 1x1 convolution: a rule must leave Conv2d in float"
    s, (n, k) = layer.scheme, (layer.out_features, layer.in_features)
    if s.rotate or s.scales == "two_level" or s.group_size != layout.GROUP:
        return "nunchaku wants the options rotate: false, scales: group_half, group_size: 64; see recipe w4a4_nunchaku"
    if n % layout.TILE or k % layout.TILE:
        return f"nunchaku's kernels take multiples of 128 features, and this layer is {n} x {k}"
    branch = layer.proj_down
    if layer.dtype not in HALF or (branch is not None and branch.dtype != layer.dtype):
        return f"nunchaku runs in 16 bits: quantize a bfloat16 or float16 model (this one is {layer.dtype})"
    for name, tensor in (("scale", layer.scale), ("smooth_factor", layer.smooth_factor), ("bias", layer.bias)):
        if tensor is not None and not torch.equal(tensor.to(layer.dtype).to(tensor.dtype), tensor):
            return f"{name} does not fit in {layer.dtype} without rounding: quantize with scales: group_half"
    return ""


def split_rows(layer: SVDQW4A4Linear, sizes: list[int]) -> list[SVDQW4A4Linear]:
    """The layers that compute the parts of one layer's output, such as q, k and v of a fused projection.

    sizes: of the parts, which add up to out_features. Each gets its own copy of what the parts share.
    """
    if sum(sizes) != layer.out_features:
        raise ValueError(
            f"parts of {', '.join(map(str, sizes))} rows do not make the {layer.out_features} of the layer"
        )
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        part = _like(layer, layer.in_features, size)
        part.qweight, part.scale = layer.qweight[rows].clone(), layer.scale[rows].clone()
        part.smooth_factor = layer.smooth_factor.clone()
        if layer.proj_up is not None:
            part.proj_down, part.proj_up = layer.proj_down.clone(), layer.proj_up[rows].clone()
        if layer.bias is not None:
            part.bias = nn.Parameter(layer.bias.detach()[rows].clone(), requires_grad=False)
        parts.append(part)
        start += size
    return parts


def join_columns(layers: list[SVDQW4A4Linear]) -> SVDQW4A4Linear:
    """The layer that computes the sum of what several make of the parts of its input, in their order.

    nunchaku splits FLUX's `proj_out` so. Every input but the last must be whole groups. The ranks add up; of several
    biases the sum is taken in float32. One layer with 8-bit activations makes the whole one such.
    """
    first, *_ = layers
    if any(x.in_features % layout.GROUP for x in layers[:-1]):
        raise ValueError("parts of the input must be whole groups of 64")
    if len({x.scheme.rank > 0 for x in layers}) > 1:
        raise ValueError("some of the parts have a low-rank branch, and some have none")
    wide = next((x for x in layers if isinstance(x, SVDQW4A8Linear)), first)
    joined = _like(wide, sum(x.in_features for x in layers), first.out_features, sum(x.scheme.rank for x in layers))
    joined.qweight = torch.cat([x.qweight for x in layers], 1)
    joined.scale = torch.cat([x.scale for x in layers], 1)
    joined.smooth_factor = torch.cat([x.smooth_factor for x in layers])
    if first.proj_up is not None:
        joined.proj_down = torch.block_diag(*(x.proj_down for x in layers))
        joined.proj_up = torch.cat([x.proj_up for x in layers], 1)
    biases = [x.bias.detach().float() for x in layers if x.bias is not None]
    if biases:
        joined.bias = nn.Parameter(torch.stack(biases).sum(0).to(first.dtype), requires_grad=False)
    return joined


def import_awq(tensors: dict[str, Tensor], shape: tuple[int, int], modulation: bool = False) -> W4A16Linear:
    """The W4A16 layer of an adaLN modulation or a last layer, from the tensors of nunchaku's `AWQW4A16Linear`.

    qweight (N / 4, K / 2) int32, wscales and wzeros (K / 64 or more, N): w = wscales * code + wzeros, code 0..15.
    modulation: of the engine's own files, where the rows of the C = N / K vectors that an adaLN block makes
    are interleaved (n = i C + chunk), and 1 is added to the bias of its scales; both are undone.
    Raises ValueError if a zero is no whole multiple of its scale, as the format allows and W4A16Linear does not.
    """
    (n, k), groups = shape, shape[1] // layout.GROUP
    qweight = tensors["qweight"]
    if n % 4 or k % layout.GROUP or qweight.shape != (n // 4, k // 2) or qweight.dtype != torch.int32:
        raise ValueError(f"qweight {qweight.dtype} {tuple(qweight.shape)} is not that of a {n} x {k} layer")
    if modulation and n % k:
        raise ValueError(f"{n} x {k} is no modulation, which makes whole vectors of {k} features")
    missing = sorted(AWQ - tensors.keys())
    if missing:
        raise ValueError(f"no AWQ layer: missing {', '.join(missing)}")
    fits = {name: _has_groups(tensors[name], groups, n) for name in ("wscales", "wzeros")}
    if tensors.get("bias") is not None:
        fits["bias"] = tensors["bias"].shape == (n,)
    for name, right in fits.items():
        if not right or not tensors[name].is_floating_point():
            got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            raise ValueError(f"{name} {got} is not that of a {n} x {k} layer")
    codes = _awq_codes(qweight)  # (N, K) in 0..15
    scale, zero = (tensors[name][:groups].float().t() for name in ("wscales", "wzeros"))  # (N, K / 64)
    _check_positive("wscales", scale)
    center = (-zero / scale).round()
    # wzeros was rounded to 16 bits on its own.
    close = (zero + center * scale).abs() <= zero.abs() * torch.finfo(tensors["wzeros"].dtype).eps
    if not close.all() or center.min() < 0 or center.max() > 15:
        raise ValueError("wzeros holds zeros that are no multiple 0..15 of their scale")
    bias = None if tensors.get("bias") is None else tensors["bias"].float()
    if modulation:
        chunks = n // k
        order = torch.arange(n, device=codes.device).reshape(k, chunks).t().flatten()
        codes, scale, center = codes[order], scale[order], center[order]
        if bias is not None:
            bias = bias[order].reshape(chunks, k)
            bias[[1, -2] if chunks > 3 else [1]] -= 1  # (1 + scale) of diffusers' own block
            bias = bias.flatten()
    dtype = tensors["wscales"].dtype
    layer = W4A16Linear(
        k, n, bias=False, group_size=layout.GROUP, zero_point=True, rotate=False, device=codes.device, dtype=dtype
    )
    layer.qweight = pack_int4(codes - 8)
    layer.scale, layer.zero_point = scale.to(dtype).contiguous(), (center - 8).to(torch.int8).contiguous()
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def _has_groups(tensor: Tensor, groups: int, n: int) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] >= groups and tensor.shape[1] == n


def _awq_codes(qweight: Tensor) -> Tensor:
    """(N / 4, K / 2) int32 -> (N, K) int8 in 0..15.

    16-bit word j of 32 columns holds columns j, 8 + j, 16 + j and 24 + j, and the words of 64 columns of four rows
    stand one row after another (TinyChat's order).
    """
    quarter, half = qweight.shape
    words = qweight.contiguous().view(torch.int16).reshape(quarter, 2 * half // 64, 4, 16).transpose(1, 2)
    words = words.reshape(4 * quarter, -1, 8)  # (N, K / 32, 8)
    codes = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], dim=2)
    return codes.flatten(1).to(torch.int8)


def _row_major(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """codes (N, K), scale (N, K / 64), smooth (K,), down (K, R), up (N, R), bias (N,) or None; all checked."""
    nvfp4 = [name for name in NVFP4_ONLY if name in tensors]
    if nvfp4 or getattr(tensors.get("wscales"), "dtype", None) == torch.float8_e4m3fn:
        raise ValueError("an NVFP4 layer: only int4 ones can be imported")
    missing, extra = sorted(SVDQ - tensors.keys()), sorted(tensors.keys() - SVDQ - {"bias"})
    if missing or extra:
        raise ValueError(
            f"no SVDQ layer: missing {', '.join(missing) or 'nothing'}; strange {', '.join(extra) or 'none'}"
        )
    qweight = tensors["qweight"]
    if qweight.ndim != 2 or qweight.dtype != torch.int8:
        raise ValueError(f"qweight must be int8 of two dimensions, got {qweight.dtype} {tuple(qweight.shape)}")
    if tensors["proj_down"].ndim != 2:
        raise ValueError(f"proj_down must have two dimensions, got {tuple(tensors['proj_down'].shape)}")
    (n, half), rank = qweight.shape, tensors["proj_down"].shape[1]
    k = 2 * half
    if n % layout.TILE or k % layout.TILE or rank % layout.RANK_TILE:
        raise ValueError(f"tiles are of 128 x 128 codes and of rank 16, and this layer is {n} x {k} of rank {rank}")
    wanted = {
        "wscales": (k // layout.GROUP, n),
        "smooth_factor": (k,),
        "proj_down": (k, rank),
        "proj_up": (n, rank),
        "bias": (n,),
    }
    dtype = tensors["proj_down"].dtype
    for name, size in wanted.items():
        if name in tensors and (tensors[name].shape != size or tensors[name].dtype not in HALF):
            got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            raise ValueError(f"{name} must be bfloat16 or float16 {size}, got {got}")
        if name in tensors and tensors[name].dtype != dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, and proj_down {dtype}")
    bias = tensors.get("bias")
    return (
        layout.untile_codes(qweight),
        layout.untile_scales(tensors["wscales"]),
        layout.untile_vector(tensors["smooth_factor"]),
        layout.untile_down(tensors["proj_down"]),
        layout.untile_up(tensors["proj_up"]),
        None if bias is None else layout.untile_vector(bias),
    )


def _like(layer: SVDQW4A4Linear, in_features: int, out_features: int, rank: int | None = None) -> SVDQW4A4Linear:
    scheme = layer.scheme.model_copy(update={"rank": layer.scheme.rank if rank is None else rank})
    return type(layer)(
        in_features, out_features, bias=False, scheme=scheme, device=layer.qweight.device, dtype=layer.dtype
    )


def _check_positive(name: str, tensor: Tensor) -> None:
    if not (torch.isfinite(tensor).all() and (tensor > 0).all()):
        raise ValueError(f"{name} holds values that are not positive numbers")
