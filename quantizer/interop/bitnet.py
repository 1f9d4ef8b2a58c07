"""BitNet models as transformers has them (quant_method "bitnet"): layers in and out, and whole models.

    from_transformers(model)                     its BitLinear and AutoBitLinear layers become ours, in place
    to_transformers(model, "folder")             a folder that transformers' own `from_pretrained` reads

What transformers stores for a layer (integrations/bitnet.py):

    weight        (N / 4, K) uint8; bits 2 i and 2 i + 1 of row r hold row i N / 4 + r, as code + 1
    weight_scale  (1,)       linear_class "bitlinear": y is divided by it, so it is 1 / mean |w|
                             linear_class "autobitlinear": y is multiplied by it, so it is mean |w|
    bias          (N,)       "autobitlinear" multiplies it by weight_scale too, so it is the bias / mean |w|

The two conventions cannot be told apart by the tensors; the config says which. Needs the extra `hf`, for whole models
only.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...kernels.packing import pack_ternary, unpack_ternary
from ...layers import BitNetLinear
from ..checkpoint import quantized_layers
from ..surgery import replace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LinearClass = Literal["bitlinear", "autobitlinear"]
LINEAR_CLASSES = ("bitlinear", "autobitlinear")


def export_layer(layer: BitNetLinear, linear_class: LinearClass = "bitlinear") -> dict[str, Tensor]:
    """The tensors of one layer: weight (N / 4, K) uint8, weight_scale (1,) float32, and bias (N,) if it has one.

    Raises ValueError if the layer has more than one scale, or a number of rows that 4 does not divide: neither can be
    said in this layout.
    """
    _check_class(linear_class)
    n = layer.out_features
    if n % 4:
        raise ValueError(f"transformers packs four rows into one, and {n} rows are no multiple of 4")
    scale = layer.scale[:1].clone()
    if not torch.equal(layer.scale, scale.expand(n)):
        raise ValueError("transformers has one scale for a weight, and this layer has one for each of several groups")
    codes = unpack_ternary(layer.qweight)[:, : layer.in_features]
    quads = (codes + 1).view(torch.uint8).unflatten(0, (4, -1))  # (4, N / 4, K)
    weight = quads[0] | (quads[1] << 2) | (quads[2] << 4) | (quads[3] << 6)
    tensors = {"weight": weight, "weight_scale": 1 / scale if linear_class == "bitlinear" else scale}
    if layer.bias is not None:
        bias = layer.bias.detach()
        tensors["bias"] = bias.clone() if linear_class == "bitlinear" else (bias.float() / scale).to(bias.dtype)
    return tensors


def import_layer(
    tensors: dict[str, Tensor], linear_class: LinearClass, dtype: torch.dtype | None = None
) -> BitNetLinear:
    """The inverse of :func:`export_layer`. dtype: the nominal type, by default that of weight_scale.

    Raises ValueError for tensors of another shape or type, a code that is not ternary, or a scale that is no positive
    number.
    """
    _check_class(linear_class)
    missing = {"weight", "weight_scale"} - tensors.keys()
    if missing:
        raise ValueError(f"a BitNet layer of transformers has weight and weight_scale; missing: {', '.join(missing)}")
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    if weight.dtype != torch.uint8 or weight.ndim != 2:
        raise ValueError(f"weight must be uint8 of two dimensions, got {weight.dtype} {tuple(weight.shape)}")
    codes = torch.cat([(weight >> shift) & 3 for shift in (0, 2, 4, 6)]).view(torch.int8) - 1  # (N, K)
    return _from_codes(codes, scale, linear_class, bias, dtype or scale.dtype)


def from_transformers(model: nn.Module) -> nn.Module:
    """Replace every BitLinear and AutoBitLinear of transformers by a BitNetLinear; in place, and returned.

    model: as `from_pretrained` gives it. Layers that quantize float weights online become ternary for good.
    Raises ValueError, before anything is replaced, if there is no such layer, or one has a norm inside.
    """
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear

    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (AutoBitLinear, BitLinear)):
            names.setdefault(module, []).append(name)
    if not names:
        raise ValueError("the model has no BitNet layer of transformers")
    for module, (name, *_) in names.items():
        if module.rms_norm is not None:
            raise ValueError(f"layer '{name}' has a norm inside (use_rms_norm), which a BitNetLinear has not")
    return replace(model, *((tuple(paths), _from_module(module)) for module, paths in names.items()))


def _from_module(module: nn.Module) -> BitNetLinear:
    if getattr(module, "online_quant", False):  # AutoBitLinear with the weight that it was trained with
        layer = BitNetLinear(
            module.in_features, module.out_features, False, device=module.weight.device, dtype=module.weight.dtype
        )
        layer.quantize(module.weight.detach())
        layer.bias = module.bias
    elif module.weight.dtype == torch.uint8:
        layer = import_layer(dict(module.named_buffers()), "bitlinear", module.dtype)
    else:  # AutoBitLinear unpacks its codes into floats
        tensors = module.weight.detach(), module.weight_scale, "autobitlinear"
        layer = _from_codes(*tensors, None if module.bias is None else module.bias.detach(), module.weight.dtype)
    return layer.train(module.training)


def _from_codes(
    codes: Tensor, weight_scale: Tensor, linear_class: str, bias: Tensor | None, dtype: torch.dtype
) -> BitNetLinear:
    n, k = codes.shape
    scale = weight_scale.detach().float().reshape(-1)
    if scale.numel() != 1 or not (torch.isfinite(scale).all() and scale > 0):
        raise ValueError(f"weight_scale must be one positive number, got {weight_scale.tolist()}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
    layer = BitNetLinear(k, n, bias=False, device=codes.device, dtype=dtype)
    layer.qweight = pack_ternary(codes)
    layer.scale = (1 / scale if linear_class == "bitlinear" else scale).repeat(n)
    if bias is not None:
        bias = bias if linear_class == "bitlinear" else bias.float() * scale
        layer.bias = nn.Parameter(bias.to(dtype).clone(), requires_grad=False)
    return layer


def to_transformers(model: "PreTrainedModel", folder: str | Path, linear_class: LinearClass = "autobitlinear") -> None:
    """Write config.json and model.safetensors that transformers' `from_pretrained` loads as a BitNet model.

    A tokenizer is the caller's to save there.

    model: of transformers, with BitNetLinear layers; every other nn.Linear goes as it is, and is named in the config.
    "autobitlinear" is the more accurate choice: with "bitlinear" transformers sums raw codes in the model's type.
    Raises ValueError for a model without such layers or with other quantized ones, and as :func:`export_layer`.
    """
    _check_class(linear_class)
    ours = quantized_layers(model)
    others = sorted({m.scheme_name for m in ours.values() if not isinstance(m, BitNetLinear)})
    if not ours or others:
        raise ValueError(f"only bitnet layers can be written so, and the model has {', '.join(others) or 'none'}")
    state = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in ours}
    # Of tied tensors the first: the loader ties the others to it again.
    firsts = {(t.data_ptr(), t.shape): name for name, t in reversed(state.items())}
    state = {name: t for name, t in state.items() if firsts[t.data_ptr(), t.shape] == name}
    for name, layer in ours.items():
        try:
            state |= {f"{name}.{key}": tensor for key, tensor in export_layer(layer, linear_class).items()}
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from None
    config = copy.deepcopy(model.config)
    config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": [name for name, m in model.named_modules() if isinstance(m, nn.Linear)],
    }
    config.architectures = [type(model).__name__]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})


def _check_class(linear_class: str) -> None:
    if linear_class not in LINEAR_CLASSES:
        raise ValueError(f"linear_class must be one of {', '.join(LINEAR_CLASSES)}, got {linear_class!r}")
