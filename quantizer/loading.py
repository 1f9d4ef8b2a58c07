"""Load a checkpoint into a model: all is checked first, then all is put in place, or nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers import EMBEDDINGS, Experts, QuantEmbedding, QuantLayer, is_fused, tie, why_not_split
from ..recipes import suggest
from .checkpoint import CONFIG, GUARD, REPORT, join, read_config, read_json
from .errors import CheckpointError, some
from .interop import foreign
from .interop.clients import attach
from .kinds import empty, shape_of
from .report import Report
from .rules import ALL
from .surgery import FLOATS, Site, find_sites, replace, split_experts
from .weight_files import Kind, raise_all, read_kinds, read_tensors, weight_files

NAMED_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def load(
    path: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load what `save` wrote, or what others quantized: a folder in the format of compressed-tensors (llm-compressor),
    GPTQ or AWQ, as its config.json says, or a .gguf file.

    model: the original float model with any weights, also on the meta device, or a function that builds it; None
    builds the transformers model that the folder or file describes (extra `hf`), in eval mode.
    Its layers are replaced in place and its tensors by those of the files (in their dtypes; for formats of others in
    the model's); it is returned.
    device: where to load the tensors, e.g. "cuda"; otherwise where the model is, CPU for a model on meta.
    Strict: a missing, unexpected, misshaped or damaged tensor, an unknown version or scheme raises
    CheckpointError, and the model is then as it was.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        from .interop import gguf as others  # which need packages that others may not have
    elif foreign.method_of(path):
        others = foreign
    else:
        others = None
        quantization = read_config(path)
        files = weight_files(path, quantization["files"])
    model = _built(path, model)
    with _all_or_nothing(model):
        if others is None:
            model = _fill(path, model, quantization, files, device)
        else:
            model = others.load(path, model, device if device is not None else _device_of(model))
            _check_meta(path, model)
    attach(model)
    return model if device is None else model.to(device)


def _built(path: Path, model: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if model is None:
        if path.is_dir() and "model_type" not in read_json(path / CONFIG):
            raise CheckpointError(
                f"{path}: its config.json names no model of transformers, so give the float model that it was made "
                "from, with any weights: load(path, model=...)"
            )
        from .interop.huggingface import ModelFolder

        return ModelFolder(path).skeleton()
    model = model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory given as model= returned a {type(model).__name__}, not an nn.Module")
    return model


def _fill(
    path: Path, model: nn.Module, quantization: dict[str, Any], files: list[Path], device: torch.device | str | None
) -> nn.Module:
    tied = quantization["tied"]
    model, sites, layers = fit(path, model, quantization, files)
    _check_meta(path, model)
    reports = read_reports(path)
    # From here on the files are known to fit.
    tensors = read_tensors(files, torch.device(device) if device is not None else _device_of(model))
    state = {name: t for name, t in tensors.items() if not _is_guard(name, layers)}
    state.update({name: tensors[source] for name, source in tied.items()})
    model = put(model, sites, layers, reports)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not for this model: {error}") from None
    _tie_again(model, tied)
    tie_codes(layers[site.name] for site in sites)
    return model


def fit(
    path: Path, model: nn.Module, quantization: dict[str, Any], files: list[Path]
) -> tuple[nn.Module, list[Site], dict[str, QuantLayer]]:
    """The model with its experts split as the checkpoint has them, the places of its quantized layers, and these,
    empty on meta, by name. CheckpointError where model, config and files do not fit together to the last tensor."""
    entries = quantization["layers"]
    model = _split(path, model, quantization["experts"])
    sites = _check_places(path, model, entries)
    layers = {name: build_layer(path, name, entry) for name, entry in entries.items()}
    _check_tensors(path, _expected(path, model, layers), read_kinds(files), quantization["tied"], layers)
    return model, sites, layers


def put(model: nn.Module, sites: list[Site], layers: dict[str, QuantLayer], reports: dict[str, Any]) -> nn.Module:
    """The model with the layers in their places."""
    for site in sites:
        layer = layers[site.name]
        layer.report = reports.get(site.name)
        if site.is_embedding:
            layer.padding_idx = site.module.padding_idx
        elif layer.bias is not None and site.module.bias is not None:
            layer.bias.requires_grad_(site.module.bias.requires_grad)
        model = replace(model, (site.names, layer))
    return model


def _split(path: Path, model: nn.Module, names: dict[str, str]) -> nn.Module:
    """The model with the fused experts split that were split when it was saved."""
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for name, kind in names.items():
        module = modules.get(name)
        if not isinstance(module, Experts) and (module is None or not is_fused(module) or why_not_split(module)):
            what = "missing" if module is None else f"a {type(module).__name__} that cannot be split"
            problems.append(f"{name!r} was split into experts from a {kind}; in the model it is {what}")
    raise_all(problems, path)
    return split_experts(model, (join(name, "0.down_proj") for name in names))


def _check_places(path: Path, model: nn.Module, entries: dict[str, dict]) -> list[Site]:
    """The linear layers to replace, each once; CheckpointError where the model has no such layers."""
    # Not get_submodule, which would run the properties that a file names.
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = {name: site for site in find_sites(model) for name in site.names}
    problems = []
    for name, entry in entries.items():
        if name not in modules:
            near = suggest(name, sites)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            problems.append(f"no layer {name!r} in the model{hint}")
            continue
        if name not in sites or sites[name].is_embedding != _is_embedding(entry):
            wanted = "an embedding" if _is_embedding(entry) else "a linear layer"
            problems.append(f"{name!r} is a {type(modules[name]).__name__} in the model, not {wanted}")
            continue
        site = sites[name]
        here, there = shape_of(site.module), (entry.get("out_features"), entry.get("in_features"))
        if site.obstacle:
            problems.append(f"{name!r} cannot be replaced: {site.obstacle}")
        elif here != there:
            problems.append(f"{name!r} is {_times(here)} in the model, {_times(there)} in the checkpoint")
        elif any(entries.get(other) != entry for other in site.names):
            problems.append(f"{' and '.join(map(repr, site.names))} are one layer in the model, not in the checkpoint")
    raise_all(problems, path)
    return list({id(sites[name]): sites[name] for name in entries}.values())


def _is_embedding(entry: dict[str, Any]) -> bool:
    return str(entry.get("scheme")) in EMBEDDINGS


def _times(shape: tuple[Any, Any]) -> str:
    return " x ".join(map(repr, shape))


def build_layer(path: Path, name: str, entry: dict[str, Any]) -> QuantLayer:
    """An empty layer on meta, from its entry in the config; its shape is known to be the model's."""
    where = f"{path / CONFIG}: layer {name!r}"
    missing = {"scheme", "options", "dtype", "in_features", "out_features", "bias"} - entry.keys()
    if missing:
        raise CheckpointError(f"{where}: the entry has no {', '.join(sorted(missing))}")
    scheme, options, dtype, bias = (entry[key] for key in ("scheme", "options", "dtype", "bias"))
    if not isinstance(scheme, str) or scheme not in ALL:
        near = suggest(str(scheme), ALL)
        hint = f"; nearest: {near[0]}" if near else ""
        raise CheckpointError(f"{where}: no scheme {scheme!r} in this qgraft{hint}; upgrade qgraft?")
    if not isinstance(dtype, str) or dtype not in NAMED_FLOATS:
        raise CheckpointError(f"{where}: dtype {dtype!r} is none of {', '.join(NAMED_FLOATS)}")
    if not isinstance(bias, bool) or not isinstance(options, dict):
        raise CheckpointError(f"{where}: bias must be true or false, and options a mapping")
    cls, shape = ALL[scheme], (entry["out_features"], entry["in_features"])
    try:
        return empty(cls, shape, cls.Scheme(**options), NAMED_FLOATS[dtype], bias)
    except (TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise CheckpointError(f"{where}: {error}") from None


def _expected(path: Path, model: nn.Module, layers: dict[str, QuantLayer]) -> dict[str, Kind]:
    """Shape and type, by name, of every tensor that the model will want once its layers are replaced."""
    inside = tuple(join(name, "") for name in layers)
    kinds: dict[str, Kind] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(inside):
            continue
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: '{name}' of the model's state is no tensor; no checkpoint holds it")
        if is_lazy(tensor):
            raise CheckpointError(f"{path}: '{name}' of the model has no shape yet: run the model once first")
        kinds[name] = tuple(tensor.shape), tensor.dtype
    for name, layer in layers.items():
        kinds.update({join(name, k): (tuple(t.shape), t.dtype) for k, t in layer.state_dict().items()})
    return kinds


def _check_tensors(
    path: Path, expected: dict[str, Kind], found: dict[str, Kind], tied: dict[str, str], layers: dict
) -> None:
    found = {name: kind for name, kind in found.items() if not _is_guard(name, layers)}
    problems = [f"{n!r} is tied to {s!r}, which is missing" for n, s in tied.items() if s not in found]
    problems += [f"{n!r} is tied to {s!r}, and has a value of its own too" for n, s in tied.items() if n in found]
    found |= {name: found[source] for name, source in tied.items() if source in found}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {some(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors are not the model's: {some(extra)}")
    for name in sorted(expected.keys() & found.keys()):
        (shape, dtype), (file_shape, file_dtype) = expected[name], found[name]
        if shape != file_shape:
            problems.append(f"{name!r} has shape {file_shape} in the file, {shape} in the model")
        elif dtype != file_dtype and not (dtype in FLOATS and file_dtype in FLOATS):
            problems.append(f"{name!r} is {file_dtype or 'of an unknown type'} in the file, {dtype} in the model")
    raise_all(problems, path)


def _is_guard(name: str, layers: dict) -> bool:
    prefix, _, leaf = name.rpartition(".")
    return leaf == GUARD and prefix in layers


def _device_of(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _check_meta(path: Path, model: nn.Module) -> None:
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    persistent = model.state_dict().keys()  # all of these get a value, or belong to a layer that is replaced
    left = [n for n in left if n not in persistent]
    if left:
        raise CheckpointError(
            f"{path}: the model computes {some(left)} when it is built, and no checkpoint holds them; build "
            "the model on CPU instead of meta"
        )


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts every module's own state back if the block fails: whatever fails, nothing is half loaded."""
    own = ("_parameters", "_buffers", "_modules")
    before = {m: (dict(m.__dict__), [dict(m.__dict__[key]) for key in own]) for m in model.modules()}
    try:
        yield
    except BaseException:
        for module, (attributes, parts) in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, part in zip(own, parts, strict=True):
                module.__dict__[key].clear()
                module.__dict__[key].update(part)
        raise


def _tie_again(model: nn.Module, tied: dict[str, str]) -> None:
    """`assign` made a parameter of its own of each name; make tied ones one again."""
    for name, source in tied.items():
        owner, _, leaf = name.rpartition(".")
        other, _, other_leaf = source.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        parameter = model.get_submodule(other)._parameters.get(other_leaf)
        if parameter is not None and leaf in parameters:
            parameters[leaf] = parameter


def tie_codes(layers: Iterable[QuantLayer]) -> None:
    """A head that got the very codes of an embedding keeps sharing them, wherever the two are moved."""
    layers = list(layers)
    for embedding in layers:
        for head in layers if isinstance(embedding, QuantEmbedding) else ():
            same = all(head._buffers.get(name) is buffer for name, buffer in embedding._buffers.items())
            if same and head is not embedding:
                tie(embedding, head)


def read_reports(path: Path) -> dict[str, Any]:
    file = path / REPORT
    if not file.exists():
        return {}
    try:
        return {row.name: row for row in Report.from_dict(read_json(file)).layers}
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
