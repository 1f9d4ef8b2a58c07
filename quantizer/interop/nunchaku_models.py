"""Whole SVDQuant models: nunchaku's published int4 files, and the folders of diffusers' quant method `nunchaku_lite`.

    model = load_nunchaku("svdq-int4_r32-flux.1-dev.safetensors", FluxTransformer2DModel.from_config(config))
    save_nunchaku(model, "folder")      FluxTransformer2DModel.from_pretrained("folder") of diffusers reads it

The files differ in their names only. nunchaku's own have q, k and v in one layer, which is split into those of the
model; FLUX's `proj_out` in two, which are joined; and its first release had names of its own (`qkv_proj`, `mlp_fc1`).
A model that holds a layer of the file's very name gets it as it is.
"""

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...layers import QuantLinear
from ..checkpoint import join, quantized_layers, read_json
from ..errors import CheckpointError
from ..kinds import shape_of
from ..surgery import Site, find_sites, replace
from ..weight_files import raise_all, read_kinds, read_tensors
from . import nunchaku

METHOD = "nunchaku_lite"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHT_FILE = re.compile(r"diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors")
# nunchaku 0.x for FLUX -> the names since 1.0, which are diffusers' own but for what is fused.
FLUX_V1 = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
    "norm_added_q": "attn.norm_added_q",
    "norm_added_k": "attn.norm_added_k",
}
FLUX_V1_SINGLE = {
    "qkv_proj": "attn.to_qkv",
    "out_proj": "attn.to_out",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
}
BLOCK = re.compile(r"(?P<block>(?P<single>single_)?transformer_blocks\.\d+)\.(?P<leaf>\w+)(?P<rest>\..*)?")
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
SINGLE_BLOCK = {"mlp_fc1": "proj_mlp", "attn.to_out": "proj_out", "mlp_fc2": "proj_out"}
# Layers after a GELU, whose input the engine shifts; nunchaku_lite runs all layers alike.
SHIFTED = ("*.ff.net.2", "*.ff_context.net.2", "*.mlp_fc2", "*.img_mlp.net.2", "*.txt_mlp.net.2")
# adaLN layers whose rows the engine interleaves.
MODULATION = ("*.norm.linear", "*.norm1.linear", "*.norm1_context.linear", "*.img_mod.1", "*.txt_mod.1")


def load_nunchaku(
    path: str | Path,
    model: nn.Module,
    *,
    names: Mapping[str, str | tuple[str, ...]] | None = None,
    shifted: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Put the tensors of a nunchaku file, or of a `nunchaku_lite` folder, into a model; in place, and returned.

    model: the float model with any weights, also on meta. SVDQ layers become `SVDQW4A4Linear`, those on shifted
    inputs `SVDQW4A8Linear`, AWQ layers `W4A16Linear`; all other tensors are taken as they are in the file.
    names: for other models, layer of the file -> layer of the model, or layers whose rows it holds in that order.
    shifted: shell patterns of the file's layers (new names) that run on x + 0.171875; by default those after a GELU in
    a file, none in a folder. Raises CheckpointError, before the model is touched, if anything does not fit.
    """
    path = Path(path)
    files = _files(path)
    engine = path.is_file()
    read_kinds(files)  # a tensor that two files hold is an error
    stored, floats = _by_layer(read_tensors(files, torch.device(device)))
    if not stored:
        raise CheckpointError(f"{path}: holds no layer of nunchaku (no tensor is called *.qweight)")
    sites = {name: site for site in find_sites(model) for name in site.names}
    pieces, problems = _places(stored, sites, names or {})
    raise_all(problems, path)
    patterns = tuple(shifted) if shifted is not None else SHIFTED if engine else ()
    layers: dict[str, QuantLinear] = {}
    for target, parts in pieces.items():
        try:
            layers |= _build(target, parts, stored, sites, patterns, engine)
        except ValueError as error:
            problems.append(f"{' and '.join(map(repr, parts))}: {error}")
    raise_all(problems, path)
    state = model.state_dict()
    inside = tuple(join(name, "") for name in layers)
    expected = {name: t for name, t in state.items() if not name.startswith(inside)}
    problems = [f"{name!r} is missing" for name in sorted(expected.keys() - floats.keys())]
    problems += [f"{name!r} is not the model's" for name in sorted(floats.keys() - expected.keys())]
    problems += [
        f"{name!r} has shape {tuple(floats[name].shape)} in the file, {tuple(expected[name].shape)} in the model"
        for name in sorted(expected.keys() & floats.keys())
        if floats[name].shape != expected[name].shape
    ]
    problems += [
        f"{name!r} is {floats[name].dtype} in the file, {expected[name].dtype} in the model"
        for name in sorted(expected.keys() & floats.keys())
        if floats[name].is_floating_point() != expected[name].is_floating_point()
    ]
    computed = {name for name, buffer in model.named_buffers() if buffer.is_meta} - state.keys()
    problems += [f"{name!r} is computed when the model is built: build it on CPU, not on meta" for name in computed]
    raise_all(problems, path)
    model = replace(model, *((sites[name].names, layer) for name, layer in layers.items()))
    own = {join(name, leaf): t for name, layer in layers.items() for leaf, t in layer.state_dict().items()}
    model.load_state_dict(floats | own, strict=True, assign=True)
    return model


def save_nunchaku(model: nn.Module, folder: str | Path) -> None:
    """Write a diffusers model with `w4a4_svd` layers as a `nunchaku_lite` folder; every number as it is.

    model: of diffusers, quantized by a recipe such as `w4a4_nunchaku`; its other layers are written in float. All
    branches get the rank of the largest, filled with zeros. folder: new or empty.
    Raises CheckpointError if a layer does not fit the format (see :func:`nunchaku.why_not_exported`).
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not an empty folder")
    if not hasattr(model, "to_json_string"):
        raise CheckpointError(f"a {type(model).__name__} is no model of diffusers: it has no config to save")
    layers = quantized_layers(model)
    raise_all(f"layer '{name}': {why}" for name, m in layers.items() if (why := nunchaku.why_not_exported(m)))
    if not layers:
        raise CheckpointError("the model has no quantized layer: call Quantizer(model).quantize(...) first")
    dtypes = {str(layer.dtype).removeprefix("torch.") for layer in layers.values()}
    if len(dtypes) > 1:
        raise CheckpointError(f"layers of {' and '.join(sorted(dtypes))}: {METHOD} has one type for all")
    rank = max(nunchaku.export_rank(layer) for layer in layers.values())
    inside = tuple(f"{name}." for name in layers)
    tensors = {name: t for name, t in model.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": t for key, t in nunchaku.export_layer(layer, rank).items()}
    config = json.loads(model.to_json_string())
    config["quantization_config"] = {
        "quant_method": METHOD,
        "compute_dtype": dtypes.pop(),
        "svdq_w4a4": {"precision": "int4", "group_size": 64, "rank": rank, "targets": list(layers)},
    }
    _write(folder, config, tensors)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # Clones, because safetensors refuses tensors that share memory.
        save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, work / WEIGHTS, {"format": "pt"})
        work.chmod(0o755)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    method = (read_json(path / "config.json").get("quantization_config") or {}).get("quant_method")
    if method != METHOD:
        raise CheckpointError(f"{path}: quantized by {method!r}, not by {METHOD}")
    index = path / f"{WEIGHTS}.index.json"
    if not index.exists():
        return [path / WEIGHTS]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    files = sorted({str(name) for name in weight_map.values()})
    raise_all(f"{index}: names {name!r}, refused" for name in files if not WEIGHT_FILE.fullmatch(name))
    return [path / name for name in files]


def _by_layer(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Quantized layers by name, each a dict of its tensors, and all other tensors; new names."""
    tensors = {_new_name(name): t for name, t in tensors.items()}
    homes = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    stored: dict[str, dict[str, Tensor]] = defaultdict(dict)
    floats = {}
    for name, tensor in tensors.items():
        home, _, leaf = name.rpartition(".")
        if home in homes:
            stored[home][leaf] = tensor
        else:
            floats[name] = tensor
    return dict(stored), floats


def _new_name(name: str) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        return name
    leaf = (FLUX_V1_SINGLE if match["single"] else FLUX_V1).get(match["leaf"], match["leaf"])
    return f"{match['block']}.{leaf}{match['rest'] or ''}"


def _places(
    stored: dict[str, dict], sites: dict[str, Site], names: Mapping[str, str | tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], list[str]], list[str]]:
    """The layers of the model, several if they share one of the file, -> the layers of the file, in input order."""
    pieces: dict[tuple[str, ...], list[str]] = defaultdict(list)
    problems = [f"names: the file has no layer {name!r}" for name in names if name not in stored]
    # attn.to_out stands before mlp_fc2, as in the input of proj_out.
    for name in sorted(stored):
        if name in names:
            target = (names[name],) if isinstance(names[name], str) else tuple(names[name])
        else:
            target = _target(name, sites)
        missing = [repr(part) for part in target if part not in sites]
        if not target or missing:
            what = ", ".join(missing) or f"{name!r}"
            problems.append(f"no linear layer {what} in the model for {name!r} of the file; `names` can say which")
            continue
        problems += [f"{part!r} cannot be replaced: {o}" for part in target if (o := sites[part].obstacle)]
        pieces[target].append(name)
    taken = [part for target in pieces for part in target]
    problems += [f"{part!r} would get two layers of the file" for part in {*taken} if taken.count(part) > 1]
    return dict(pieces), problems


def _target(name: str, sites: dict[str, Site]) -> tuple[str, ...]:
    """The layers of the model for one of the file, by what nunchaku fuses and splits; none if there are none."""
    if name in sites:
        return (name,)
    home, _, leaf = name.rpartition(".")
    parts = tuple(join(home, part) for part in FUSED.get(leaf, ()))
    if parts and all(part in sites for part in parts):
        return parts
    match = re.fullmatch(r"(single_transformer_blocks\.\d+)\.(.+)", name)
    other = match and f"{match[1]}.{SINGLE_BLOCK.get(match[2], '')}"
    return (other,) if other in sites else ()


def _build(
    target: tuple[str, ...],
    parts: list[str],
    stored: dict[str, dict[str, Tensor]],
    sites: dict[str, Site],
    shifted: tuple[str, ...],
    engine: bool,
) -> dict[str, QuantLinear]:
    modules = [sites[name].module for name in target]
    sizes, inputs = zip(*map(shape_of, modules), strict=True)
    n, k = sum(sizes), inputs[0]
    if set(inputs) != {k}:
        raise ValueError("the layers of the model have inputs of different sizes")
    layers = []
    for i, part in enumerate(parts):
        tensors = stored[part]
        if tensors["qweight"].ndim != 2:
            raise ValueError(f"qweight must have two dimensions, got {tuple(tensors['qweight'].shape)}")
        # Only the last of several inputs can be padded.
        columns = 2 * tensors["qweight"].shape[-1] if i + 1 < len(parts) else k - sum(x.in_features for x in layers)
        if "wzeros" in tensors:
            modulation = engine and any(fnmatchcase(part, pattern) for pattern in MODULATION)
            layers.append(nunchaku.import_awq(tensors, (n, columns), modulation))
        else:
            shift = nunchaku.GELU_SHIFT if any(fnmatchcase(part, pattern) for pattern in shifted) else 0.0
            layers.append(nunchaku.import_layer(tensors, (n, columns), shift))
    whole = layers[0] if len(layers) == 1 else nunchaku.join_columns(layers)
    split = [whole] if len(sizes) == 1 else nunchaku.split_rows(whole, list(sizes))
    for layer, module, name in zip(split, modules, target, strict=True):
        _fit_bias(layer, module, name)
        layer.train(module.training)
    return dict(zip(target, split, strict=True))


def _fit_bias(layer: QuantLinear, module: nn.Module, name: str) -> None:
    """The engine stores a bias for every layer; zeros are none."""
    if module.bias is None and layer.bias is not None:
        if layer.bias.count_nonzero():
            raise ValueError(f"it has a bias, and '{name}' of the model has none")
        layer.bias = None
    elif module.bias is not None and layer.bias is None:
        layer.bias = nn.Parameter(
            torch.zeros(layer.out_features, dtype=layer.dtype, device=layer.qweight.device), False
        )
