"""Save and load: a folder with safetensors, config.json and report.json. No pickle, nothing executed.

    out/config.json                    the model's own config if it has one, plus `quantization_config`
    out/model.safetensors              or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    out/report.json

`quantization_config` holds {"quant_method": "qgraft", "version": 2, "layers": {name: {scheme, options,
shape}}, "tied": {name: name of the tensor it shares}, "files": {name: {size, sha256}}}, and where fused experts were
split {"experts": {name: class}}. "files" is empty where transformers' `save_pretrained` wrote the folder, which knows
no checksums.

For each quantized layer the file also holds an empty tensor `<layer>.weight`: a client that ignores the
quantization then stops at a wrong shape, where it would otherwise go on with random weights.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers import Experts, QuantLayer
from .errors import CheckpointError, some
from .kinds import shape_of
from .report import Report

# Version 1 had no zero points in `group_scale`.
VERSION = 2
CONFIG, WEIGHTS, REPORT = "config.json", "model.safetensors", "report.json"
GENERATION = "generation_config.json"
INDEX = WEIGHTS + ".index.json"
# What `save` calls its weight files; no other is opened, whatever a config or an index names.
WEIGHT_FILE = re.compile(r"model(-\d{5,9}-of-\d{5,9})?\.safetensors")
SHARD_BYTES = 5_000_000_000
GUARD = "weight"
# The types that every safetensors reader knows, by their names in the file.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save(
    model: nn.Module,
    path: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    extra_files: Iterable[str | Path] = (),
) -> None:
    """Write a quantized model as a folder.

    Atomic: everything is written to a folder beside `path`, which then takes its place; an error leaves the
    old one whole. (A kill between the two renames leaves it beside `path`, as `.<name>.<random>.old`.) An
    existing `path` must be an empty folder or a checkpoint of ours, whose other files are kept.
    shard_bytes: the largest size of one safetensors file. extra_files: copied along (a tokenizer's, say).
    Raises CheckpointError if the model has no quantized layer, or state that safetensors cannot hold.
    """
    path = Path(path).resolve()
    if not quantized_layers(model):
        raise CheckpointError("the model has no quantized layer: call Quantizer(model).quantize(...) first")
    check_whole(model)
    check_target(path)
    tensors, tied = contents(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        shards = plan_shards({name: nbytes(t) for name, t in tensors.items()}, shard_bytes)
        for file, names in shards.items():
            write_shard(work / file, {name: tensors[name] for name in names})
        write_index(work, shards, sum(map(nbytes, tensors.values())))
        finish(work, path, model, tied, extra_files)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def finish(work: Path, path: Path, model: nn.Module, tied: dict[str, str], extra_files: Iterable[str | Path]) -> None:
    """Give a folder with weight files all else that a checkpoint has, and put it in the place of `path`.

    model: its quantized layers are described; it may be on meta. On an error, what was at `path` stays there.
    """
    work.chmod(0o755)
    Report.of(model).save(work / REPORT)
    for file in work.glob("*.safetensors"):
        shutil.copymode(work / REPORT, file)  # safetensors lets nobody but the owner read what it writes
    config = model_config(model)
    config["quantization_config"] = describe(model, tied)
    config["quantization_config"]["files"] = {f.name: _fingerprint(f) for f in sorted(work.glob("*.safetensors*"))}
    write_json(work / CONFIG, config)
    for file in map(Path, extra_files):
        if not (work / file.name).exists():
            shutil.copy2(file, work / file.name)
    _write_generation_config(model, work)
    old = work.with_name(work.name + ".old")
    try:
        if path.exists():
            _keep_other_files(path, work)
            os.replace(path, old)
        os.replace(work, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)


def contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, guards included, and which names share with which.

    Raises CheckpointError for state that safetensors cannot hold, and for layers that parallelize() has spread.
    """
    check_whole(model)
    tensors, tied = state_tensors(model)
    tensors.update({join(name, GUARD): torch.empty(0, dtype=torch.int8) for name in quantized_layers(model)})
    return tensors, tied


def check_whole(model: nn.Module) -> None:
    """CheckpointError if only a part of a layer is in this process."""
    if spread := [name for name, layer in quantized_layers(model).items() if hasattr(layer, "spread_over")]:
        raise CheckpointError(f"{some(spread)}: only a part of each is here; save before parallelize()")


def describe(model: nn.Module, tied: dict[str, str]) -> dict[str, Any]:
    """The `quantization_config` of a model, which may be on meta, without the checksums of files."""
    return {
        "quant_method": "qgraft",
        "version": VERSION,
        "layers": {name: _describe(layer) for name, layer in quantized_layers(model).items()},
        "tied": tied,
        **_split_modules(model),
        "files": {},
    }


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by name, a shared one once under each of its names."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLayer)}


def _split_modules(model: nn.Module) -> dict[str, dict[str, str]]:
    """{"experts": {name: class}} of the fused modules that were split into linear layers, if there are any."""
    found = {n: m.kind.__name__ for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Experts)}
    return {"experts": found} if found else {}


def read_config(path: str | Path) -> dict[str, Any]:
    """The checked `quantization_config` of a checkpoint; CheckpointError says what is wrong with it."""
    file = Path(path) / CONFIG
    config = read_json(file)
    return check_config(config.get("quantization_config"), file)


def check_config(quantization: Any, file: str | Path) -> dict[str, Any]:
    """The same for one that has been read already; `file` is where from."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qgraft":
        why = "no quantization_config of ours"
        raise CheckpointError(f"{file}: not a qgraft checkpoint ({why}); quantize the model first")
    version = quantization.get("version")
    if type(version) is not int or version != VERSION:
        older = type(version) is int and version < VERSION
        raise CheckpointError(
            f"{file}: written in version {version!r} of the format, this qgraft reads version {VERSION}; "
            + ("quantize the model again" if older else "upgrade qgraft")
        )
    quantization.setdefault("experts", {})  # only models with fused experts have it
    for key, kind in (("layers", dict), ("tied", str), ("files", dict), ("experts", str)):
        entries = quantization.get(key)
        if not isinstance(entries, dict):
            raise CheckpointError(f"{file}: quantization_config.{key} is missing or no mapping")
        for name, entry in entries.items():
            if not isinstance(entry, kind):
                raise CheckpointError(f"{file}: quantization_config.{key}[{name!r}] is a {type(entry).__name__}")
    return quantization


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; is this the folder that qgraft.save() wrote?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return data


def fingerprint_matches(file: Path, recorded: Mapping[str, Any]) -> str:
    """What is wrong with a file that was recorded as {size, sha256}; "" if nothing is."""
    try:
        if not file.is_file():
            return f"{file}: missing"
        size, was = file.stat().st_size, recorded.get("size")
        if size != was:
            return f"{file}: {size} bytes where {was!r} were written; copied in full?"
        if _fingerprint(file) != dict(recorded):
            return f"{file}: the checksum differs from the one recorded at saving; the file is damaged"
    except OSError as error:
        return f"{file}: cannot be read: {error}"
    return ""


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _describe(layer: QuantLayer) -> dict[str, Any]:
    n, k = shape_of(layer)
    return {
        "scheme": layer.scheme_name,
        "options": layer.scheme.model_dump(),
        "in_features": k,
        "out_features": n,
        "bias": getattr(layer, "bias", None) is not None,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }


def state_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state by name, each shared tensor once, and which names share with which."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"'{name}' of the model's state is a {kind}; only tensors can be saved")
        if is_lazy(value):
            raise CheckpointError(f"'{name}' has no value yet: run the model once before saving")
        if value.is_meta:
            raise CheckpointError(f"'{name}' is on the meta device: there is nothing to save")
        if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES:
            what = f"{value.layout} tensor of {value.dtype}".replace("torch.", "")
            raise CheckpointError(f"'{name}' is a {what}, which safetensors cannot hold")
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        tensor = value.detach().cpu().contiguous()
        # Views of one memory that are not the same tensor are saved as tensors of their own.
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, tied


def model_config(model: nn.Module) -> dict[str, Any]:
    """What Hugging Face models say of themselves; empty for other modules."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = _without_quantization(to_dict()) if callable(to_dict) else {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if config.get("tie_word_embeddings") and isinstance(head, QuantLayer):
        config["tie_word_embeddings"] = False  # no float weight is; "tied" says which codes are shared
    if config and not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    if config and isinstance(getattr(model, "dtype", None), torch.dtype):
        config["dtype"] = str(model.dtype).removeprefix("torch.")  # it may have been cast since it was loaded
    return config


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    # A model inside of this one, which was saved by itself, has left its own in a config inside of this one.
    return {
        key: _without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, from the bytes of each tensor; a larger one than a shard has its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, most of all
        raise CheckpointError(f"{file}: cannot be written: {error}") from None


def _write_generation_config(model: nn.Module, folder: Path) -> None:
    """How a Hugging Face model generates, unless the file came along, or was there before."""
    to_dict = getattr(getattr(model, "generation_config", None), "to_diff_dict", None)
    if callable(to_dict) and not (folder / GENERATION).exists():
        write_json(folder / GENERATION, to_dict())


def write_index(folder: Path, shards: dict[str, list[str]], total_bytes: int) -> None:
    """Which file holds which tensor, where there are several."""
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


def check_target(path: Path) -> None:
    """Raise CheckpointError if `save` could not write to `path`, before anybody works for hours."""
    path = path.resolve()
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{path}: cannot be written, because {above} is no folder or is read-only")
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: exists and is no folder")
    if any(path.iterdir()):
        try:
            read_config(path)
        except CheckpointError:
            raise CheckpointError(
                f"{path}: exists and holds something else than a qgraft checkpoint; give a new folder"
            ) from None


def _keep_other_files(path: Path, work: Path) -> None:
    """Copy what is not of the old checkpoint itself; links stay links."""
    # By their names, because not every config records them; and a model.safetensors goes before an index.
    for file in path.iterdir():
        ours = file.name in (CONFIG, REPORT, INDEX) or WEIGHT_FILE.fullmatch(file.name)
        if ours or os.path.lexists(work / file.name):
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.copytree(file, work / file.name, symlinks=True)
        else:
            shutil.copy2(file, work / file.name, follow_symlinks=False)


def join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
