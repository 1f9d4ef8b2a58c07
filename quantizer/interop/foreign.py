"""Load what others quantized: compressed-tensors (llm-compressor, vLLM), GPTQ and AWQ folders, into our layers.

All is checked first, against the headers of the files, then all is put in place, or nothing. Weights stay packed: one
layer at a time is read, unpacked to integers and packed as ours; no float weight is ever made.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...layers import QuantLinear
from ..checkpoint import CONFIG, INDEX, WEIGHTS, join, read_json
from ..errors import CheckpointError, some
from ..kinds import shape_of
from ..surgery import FLOATS, Site, find_sites, replace
from ..weight_files import Kind, aligned, raise_all, read_kinds

METHODS = ("compressed-tensors", "gptq", "awq")
# Tensors that checkpoints hold although models compute them, or that say nothing.
NEEDLESS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


class Reader(Protocol):
    """What a format knows. Every method raises ValueError for what it cannot read."""

    def settings(self, name: str, kinds: Mapping[str, Kind]) -> Any | None:
        """How a linear layer is quantized, whose tensors have these kinds; None if it is not."""

    def expected(self, settings: Any, shape: tuple[int, int], kinds: Mapping[str, Kind]) -> dict[str, tuple]:
        """Shape and type (None: any float) of each tensor of a layer (N, K), its bias apart."""

    def build(
        self, settings: Any, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantLinear:
        """The layer, from its tensors and maybe a bias."""


def method_of(path: str | Path) -> str:
    """Who quantized a folder, if it is one that can be read here; else ""."""
    file = Path(path) / CONFIG
    if not file.is_file():
        return ""
    config = _quantization(read_json(file))
    method = str(config.get("quant_method", ""))
    return method if method in METHODS else ""


def load(path: Path, model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Put the layers and tensors of a folder in the places of a float model's; it is returned.

    model: on meta or not. Float tensors take the types of the model's, scales keep their own. Raises CheckpointError.
    """
    reader, files = _reader(path), _files(path)
    kinds = read_kinds(files)
    plan = _plan(path, model, reader, kinds)
    sources = _float_sources(path, model, plan, kinds)
    where = torch.device(device) if device is not None else torch.device("cpu")
    with ExitStack() as stack:
        streams = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        homes = {name: stream for stream in streams for name in stream.keys()}  # noqa: SIM118 - safe_open is no mapping
        state, swaps = {}, []
        for site, name, settings in plan:
            tensors = {leaf: homes[join(name, leaf)].get_tensor(join(name, leaf)) for leaf in _leaves(name, kinds)}
            layer = _build(path, reader, site, name, settings, tensors).to(where)
            for own in site.names:
                state.update({join(own, leaf): tensor for leaf, tensor in layer.state_dict().items()})
            swaps.append((site.names, layer))
        here = model.state_dict()
        state.update(
            {n: aligned(homes[source].get_tensor(source)).to(where, here[n].dtype) for n, source in sources.items()}
        )
    tied = tied_parameters(model)
    model = replace(model, *swaps)
    model.load_state_dict(state, strict=True, assign=True)
    for names in tied:
        share(model, [name for name in names if name in sources])
    return model


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # Multimodal models have had it inside of text_config, and old ones of compressed-tensors as compression_config.
    for place in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place, Mapping) and isinstance(place.get(key), Mapping):
                return place[key]
    return {}


def _reader(path: Path) -> Reader:
    from . import compressed_tensors_reader, gptq_awq

    config = _quantization(read_json(path / CONFIG))
    kinds = {
        "compressed-tensors": compressed_tensors_reader.Reader,
        "gptq": gptq_awq.GPTQReader,
        "awq": gptq_awq.AWQReader,
    }
    try:
        return kinds[config["quant_method"]](config)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: quantization_config: {error}") from None


def _files(path: Path) -> list[Path]:
    """The weight files: those of the index, model.safetensors, or the only one there is; all in the folder itself."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX}: has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        strange = [repr(n) for n in names if not n.endswith(".safetensors") or Path(n).name != n or "\\" in n]
        if strange:
            raise CheckpointError(f"{path / INDEX}: names files that are none of this folder: {some(strange)}")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if path / WEIGHTS in found:
        return [path / WEIGHTS]
    if len(found) != 1:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        hint = "; pickled weights (.bin, .pt) are not read, since reading them runs code" if pickled else ""
        raise CheckpointError(f"{path}: has {len(found)} .safetensors files and no {INDEX}{hint}")
    return found


def _plan(path: Path, model: nn.Module, reader: Reader, kinds: dict[str, Kind]) -> list[tuple[Site, str, Any]]:
    """The quantized linear layers: each once, with the name that the files have, and its settings."""
    plan, problems = [], []
    for site in find_sites(model):
        if site.is_embedding:
            continue
        for name in site.names:
            here = {leaf: kinds[join(name, leaf)] for leaf in _leaves(name, kinds)}
            try:
                settings = reader.settings(name, here)
                if settings is None:
                    continue
                problems += _problems(site, name, reader.expected(settings, shape_of(site.module), here), here)
            except ValueError as error:
                problems.append(f"layer {name!r}: {error}")
            else:
                plan.append((site, name, settings))
            break
    raise_all(problems, path)
    if not plan:
        raise CheckpointError(f"{path}: none of its quantized layers is a linear layer of {type(model).__name__}")
    return plan


def _leaves(name: str, kinds: Mapping[str, Kind]) -> list[str]:
    return [key[len(name) + 1 :] for key in kinds if key.rpartition(".")[0] == name]


def _problems(site: Site, name: str, expected: dict[str, tuple], here: dict[str, Kind]) -> Iterator[str]:
    if site.obstacle:
        yield f"layer {name!r} cannot be replaced: {site.obstacle}"
    if site.module.bias is not None or "bias" in here:
        expected = expected | {"bias": ((shape_of(site.module)[0],), None)}
    for leaf, (shape, dtype) in expected.items():
        if leaf not in here:
            yield f"{join(name, leaf)!r} is missing"
            continue
        file_shape, file_dtype = here[leaf]
        right = file_dtype == dtype if dtype is not None else file_dtype in FLOATS
        if file_shape != shape or not right:
            wanted = "float" if dtype is None else str(dtype).removeprefix("torch.")
            found = str(file_dtype).removeprefix("torch.")
            yield f"{join(name, leaf)!r} is {found} {file_shape} in the file, {wanted} {shape} is needed"
    for leaf in here.keys() - expected.keys():
        yield f"{join(name, leaf)!r} is nothing that such a layer has"


def _build(path: Path, reader: Reader, site: Site, name: str, settings: Any, tensors: dict[str, Tensor]) -> QuantLinear:
    for leaf, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {join(name, leaf)!r} has NaN or infinite values")
    try:
        layer = reader.build(settings, tensors, shape_of(site.module), site.module.weight.dtype)
    except ValueError as error:
        raise CheckpointError(f"{path}: layer {name!r}: {error}") from None
    if layer.bias is not None and site.module.bias is not None:
        layer.bias.requires_grad_(site.module.bias.requires_grad)
    for buffer_name, buffer in layer.named_buffers():
        setattr(layer, buffer_name, aligned(buffer))
    return layer


def _float_sources(
    path: Path, model: nn.Module, plan: list[tuple[Site, str, Any]], kinds: dict[str, Kind]
) -> dict[str, str]:
    """Name in the model -> name in the files, of all that is not quantized. CheckpointError if they do not match."""
    inside = tuple(join(name, "") for site, _, _ in plan for name in site.names)
    taken = {join(name, leaf) for _, name, _ in plan for leaf in _leaves(name, kinds)}
    here = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    aliases = {name: names for names in tied_parameters(model) for name in names}
    sources, problems, missing = {}, [], []
    for name, tensor in here.items():
        found = [other for other in (name, *aliases.get(name, ())) if other in kinds and other not in taken]
        if not found:
            missing.append(name)
            continue
        sources[name] = found[0]
        shape, dtype = kinds[found[0]]
        if shape != tuple(tensor.shape):
            problems.append(f"{name!r} has shape {shape} in the file, {tuple(tensor.shape)} in the model")
        elif dtype != tensor.dtype and not (dtype in FLOATS and tensor.dtype in FLOATS):
            problems.append(f"{name!r} is {dtype or 'of an unknown type'} in the file, {tensor.dtype} in the model")
    extra = kinds.keys() - taken - set(sources.values()) - here.keys()
    extra = sorted(name for name in extra if not name.endswith(NEEDLESS))
    if missing:
        problems.insert(0, f"{len(missing)} tensors are missing: {some(sorted(missing))}")
    if extra:
        problems.insert(0, f"{len(extra)} tensors are not the model's: {some(extra)}")
    raise_all(problems, path)
    return sources


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one, where there are several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def share(model: nn.Module, names: list[str]) -> None:
    """`assign` made a parameter of its own of each name; make them one again."""
    for name in names[1:]:
        (owner, _, leaf), (first, _, first_leaf) = name.rpartition("."), names[0].rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_submodule(first)._parameters[first_leaf]
