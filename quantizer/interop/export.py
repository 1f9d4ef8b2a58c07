"""Write a quantized transformers model in the format of others: compressed-tensors, which transformers and vLLM read.

export(model, "out", format="compressed-tensors")
"""

import copy
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import QuantEmbedding, QuantLinear
from ..checkpoint import (
    CONFIG,
    SHARD_BYTES,
    join,
    model_config,
    nbytes,
    plan_shards,
    quantized_layers,
    state_tensors,
    write_index,
    write_json,
    write_shard,
)
from ..errors import CheckpointError, some
from ..kinds import is_linear
from . import client_limits, compressed_tensors

FORMATS = ("compressed-tensors",)


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "compressed-tensors",
    shard_bytes: int = SHARD_BYTES,
    extra_files: Iterable[str | Path] = (),
) -> None:
    """Write a quantized model as a folder that others load without qgraft.

    model: a transformers model (it brings the config). folder: a new or empty one.
    format: "compressed-tensors": w8a16, w8a32, w8_group and w4_group, and without rotation, branch and
    smoothing w4a16, w8a8, w8a8_static, w4a4_svd and w4a8_svd. Codes and scales are written as they are. Quantized
    embeddings become float.
    extra_files: copied along (a tokenizer's, say).
    Raises CheckpointError, before anything is written, that names every layer which the format cannot hold and the
    option to change. Warns of what vLLM will not load.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}; one of {', '.join(FORMATS)}")
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is no empty folder; give a new one")
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, QuantLinear)}
    if not layers:
        raise CheckpointError("the model has no quantized linear layer: call Quantizer(model).quantize(...) first")
    _check_places(model, layers)
    settings, quantized = _layers(layers)
    tensors = _all_tensors(model, quantized)
    config = model_config(model)
    config["dtype"] = str(model.dtype).removeprefix("torch.")  # that of the float weights, whatever the config had
    untied = bool(getattr(_head(model), "tied_to", ()))
    linears = {name for name, m in model.named_modules(remove_duplicate=False) if is_linear(m)}
    config["quantization_config"] = _quantization_config(settings, linears)
    for text in client_limits.of(settings, quantized, linears, untied):
        warnings.warn(text, stacklevel=2)
    _write(folder, tensors, config, shard_bytes, model, extra_files)


def _check_places(model: nn.Module, layers: dict[str, QuantLinear]) -> None:
    """CheckpointError unless each layer is an `nn.Linear` in the model that readers build, and all else is as here."""
    from_config = getattr(type(model), "_from_config", None)
    if from_config is None or not hasattr(model, "config"):
        raise CheckpointError(f"a {type(model).__name__} is no transformers model, whose config readers build it from")
    from transformers.quantizers import base

    with torch.device("meta"):
        modules = dict(from_config(copy.deepcopy(model.config)).named_modules(remove_duplicate=False))
    strange = [name for name in layers if not isinstance(modules.get(name), nn.Linear)]
    if strange:
        kinds = sorted({type(modules[n]).__name__ if n in modules else "part of fused experts" for n in strange})
        raise CheckpointError(
            f"compressed-tensors quantizes nn.Linear only, and {len(strange)} quantized layers are something else in "
            f"the float model ({', '.join(kinds)}): {some(strange)}. Leave them in float by a rule with `skip:`"
        )
    # transformers puts modules of its own in the place of these (Llama 4's experts), with weights by other names.
    patched = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    other = {type(m).__name__ for m in modules.values()} & patched.keys()
    other = sorted(n for n in other if "compressed-tensors" in patched[n]["quantization_methods"])
    if other:
        raise CheckpointError(
            f"{', '.join(other)}: where a model is quantized in this format, transformers builds them in another way, "
            "and would fill them with random numbers. Save with qgraft.save instead"
        )


def _layers(layers: dict[str, QuantLinear]) -> tuple[dict[str, dict], dict[str, dict[str, Tensor]]]:
    """Settings and tensors of each layer; CheckpointError with all that cannot be said."""
    settings, tensors, problems = {}, {}, {}
    for name, layer in layers.items():
        try:
            settings[name], tensors[name] = compressed_tensors.export_layer(layer)
        except ValueError as error:
            problems.setdefault(f"{layer.scheme_name}: {error}", []).append(name)
    if problems:
        lines = [f"{reason} ({len(names)} layers: {some(names)})" for reason, names in problems.items()]
        raise CheckpointError("compressed-tensors cannot hold this model\n" + "\n".join(lines))
    return settings, tensors


def _all_tensors(model: nn.Module, quantized: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of the files, by name."""
    tensors = {join(name, leaf): tensor.cpu() for name, leaves in quantized.items() for leaf, tensor in leaves.items()}
    inside = tuple(join(name, "") for name in quantized_layers(model))
    state, tied = state_tensors(model)
    tensors.update({name: tensor for name, tensor in state.items() if not name.startswith(inside)})
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantEmbedding):
            tensors[join(name, "weight")] = module.weight.detach().cpu()
    head = _head(model)
    for name, source in tied.items():
        owner, _, leaf = name.rpartition(".")
        again = leaf == "weight" and model.get_submodule(owner) is head  # a reader ties it
        if not again and not name.startswith(inside):
            tensors[name] = state[source].clone()
    return tensors


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _quantization_config(settings: dict[str, dict], linears: set[str]) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for name, group in settings.items():
        groups.setdefault(repr(group), []).append(name)
    kinds = {key: settings[names[0]] for key, names in groups.items()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[max(groups, key=lambda key: len(groups[key]))]["format"],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _patterns(sorted(linears - settings.keys()), linears),
        "config_groups": {
            f"group_{i}": {"targets": _patterns(names, linears), "output_activations": None, **kinds[key]}
            for i, (key, names) in enumerate(groups.items())
        },
    }


def _patterns(names: list[str], linears: set[str]) -> list[str]:
    """The names, those that differ only in numbers as one expression if it matches no other linear layer."""
    found = []
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", r"\\d+", re.escape(name).replace(r"\.", ".")).replace(".", r"\.")
        like_it = [other for other in linears if re.fullmatch(pattern, other)]
        found.append(f"re:{pattern}$" if len(like_it) > 1 and set(like_it) <= set(names) else name)
    return list(dict.fromkeys(found))


def _write(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    shard_bytes: int,
    model: nn.Module,
    extra_files: Iterable[str | Path],
) -> None:
    """To a folder beside it, which then takes its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        work.chmod(0o755)
        shards = plan_shards({name: nbytes(tensor) for name, tensor in tensors.items()}, shard_bytes)
        for file, names in shards.items():
            write_shard(work / file, {name: tensors[name] for name in names})
        write_index(work, shards, sum(map(nbytes, tensors.values())))
        write_json(work / CONFIG, config)
        generation = getattr(model, "generation_config", None)
        if generation is not None and model.can_generate():
            generation.save_pretrained(work)
        for file in map(Path, extra_files):
            if not (work / file.name).exists():
                shutil.copy2(file, work / file.name)
        if folder.exists():
            folder.rmdir()  # empty
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
