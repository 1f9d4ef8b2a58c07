"""GGUF files (llama.cpp) into our layers: blocks of 32 weights keep their codes and scales, through the package gguf.

    Q8_0   w = d q               q int8, d float16          w8_group, groups of 32
    Q4_0   w = d (q - 8)         q in 0..15                 w4_group (w4a16 in float16), groups of 32
    Q4_1   w = d q + m           q in 0..15, m float16      w4_group with an offset: d (q - 8) + (m + 8 d)

Other types (Q6_K and the other K-quants, say) are dequantized by gguf, and so is an embedding. They stay in float, and
one warning says which; a recipe may quantize them afterwards, and leaves the other layers alone.

llama.cpp stores the rows of q and k of Llama models in the order of its own rotary embedding; they are put back, codes
and scales alike.
"""

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from ...layers import QuantLinear
from ..checkpoint import join
from ..errors import CheckpointError, some
from ..kinds import shape_of
from ..surgery import Site, find_sites, replace
from ..weight_files import raise_all
from .foreign import share, tied_parameters
from .stored import weight_only

# Architectures whose tensors llama.cpp renames and leaves as they are, but for the rows of q and k in PERMUTED.
RENAMED = ("llama", "qwen2", "qwen3", "phi3", "starcoder2")
PERMUTED = ("llama",)
# Tables that models compute.
NEEDLESS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
GROUP = 32
MOST_HEADS = 1 << 16
# Codes have this many bits. A block is a float16 scale, in Q4_1 a float16 minimum, and the codes of 32 weights.
BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}
FLOATS = ("F32", "F16", "BF16", "F64")


class Entry(NamedTuple):
    """A tensor of the file. rows: which of its rows is each of the model's, where they are permuted."""

    data: numpy.ndarray
    kind: Any
    shape: tuple[int, ...]
    rows: Tensor | None

    @property
    def type(self) -> str:
        return self.kind.name


def load(path: Path, model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Put the layers and tensors of a .gguf file in the places of a float model's; it is returned.

    model: of the architecture that the file names, as transformers builds it, on meta or not. Float tensors take the
    types of the model's. Raises CheckpointError before anything is changed.
    """
    entries = _read(path, model)
    plan = [
        site
        for site in find_sites(model)
        if not site.is_embedding and join(site.name, "weight") in entries and _holds(entries, site)
    ]
    raise_all((f"layer {s.name!r} cannot be replaced: {s.obstacle}" for s in plan if s.obstacle), path)
    sources = _sources(path, model, entries, plan)
    where = torch.device(device) if device is not None else torch.device("cpu")
    state, swaps = {}, []
    for site in plan:
        layer = _layer(entries, site).to(where)
        for own in site.names:
            state.update({join(own, leaf): tensor for leaf, tensor in layer.state_dict().items()})
        swaps.append((site.names, layer))
    here = model.state_dict()
    state.update({n: _dequantized(entries[source]).to(where, here[n].dtype) for n, source in sources.items()})
    tied = tied_parameters(model)
    model = replace(model, *swaps)
    model.load_state_dict(state, strict=True, assign=True)
    for names in tied:
        share(model, [name for name in names if name in sources])
    _report(path, len(plan), sources, entries)
    return model


def _read(path: Path, model: nn.Module) -> dict[str, Entry]:
    """The tensors of the file under the names that the model has for them."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'qgraft[hf]'") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path}: no readable GGUF file: {error}") from None

    def value(key: str) -> Any:
        field = reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{path}: does not say its {key}")
        return field.contents()

    def count(key: str, most: int) -> int:
        number = value(f"{architecture}.{key}")
        if not isinstance(number, int) or not 0 < number <= most:
            raise CheckpointError(f"{path}: says {architecture}.{key} {number}, where it can be 1 to {most}")
        return number

    architecture = value("general.architecture")
    if architecture not in RENAMED:
        raise CheckpointError(
            f"{path}: an architecture {architecture!r}, whose tensors llama.cpp may have changed; qgraft reads "
            f"{', '.join(RENAMED)} as they are. For others, load floats (`qgraft quantize FILE`) and quantize them"
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, count("block_count", len(found)))
    heads = {"attn_q": count("attention.head_count", MOST_HEADS)}
    given = reader.get_field(f"{architecture}.attention.head_count_kv") is not None
    heads["attn_k"] = count("attention.head_count_kv", heads["attn_q"]) if given else heads["attn_q"]
    entries = {}
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        theirs = f"{names.get_name(owner)}.{leaf}"
        if theirs in found:
            tensor = found.pop(theirs)
            shape = tuple(int(size) for size in reversed(tensor.shape))
            parts = heads.get(theirs.split(".")[-2]) if architecture in PERMUTED else None
            if parts is not None and shape[0] % (2 * parts):
                raise CheckpointError(
                    f"{path}: {theirs} has {shape[0]} rows, which are not {parts} heads of two halves"
                )
            rows = None if parts is None else _rows(shape[0], parts)
            entries[name] = Entry(tensor.data, tensor.tensor_type, shape, rows)
    extra = sorted(found.keys() - set(NEEDLESS))
    if extra:
        raise CheckpointError(f"{path} is not for this model: {len(extra)} tensors are not the model's: {some(extra)}")
    return entries


def _rows(n: int, heads: int) -> Tensor:
    """llama.cpp puts the two halves of each head in turn (convert_hf_to_gguf, LlamaModel.permute); this is the way
    back."""
    return torch.arange(n).view(heads, n // heads // 2, 2).transpose(1, 2).reshape(-1)


def _holds(entries: dict[str, Entry], site: Site) -> bool:
    entry = entries[join(site.name, "weight")]
    return entry.type in BITS and entry.shape == shape_of(site.module)


def _sources(path: Path, model: nn.Module, entries: dict[str, Entry], plan: list[Site]) -> dict[str, str]:
    """Name in the model -> name among the entries, of all that stays in float. CheckpointError if they do not match."""
    inside = tuple(join(name, "") for site in plan for name in site.names)
    aliases = {name: names for names in tied_parameters(model) for name in names}
    sources, problems, missing = {}, [], []
    for name, tensor in model.state_dict().items():
        if name.startswith(inside):
            continue
        source = next((other for other in (name, *aliases.get(name, ())) if other in entries), None)
        if source is None:
            missing.append(name)
        elif entries[source].shape != tuple(tensor.shape):
            problems.append(
                f"{name!r} has shape {entries[source].shape} in the file, {tuple(tensor.shape)} in the model"
            )
        else:
            sources[name] = source
    if missing:
        problems.insert(0, f"{len(missing)} tensors are missing: {some(missing)}")
    raise_all(problems, path)
    return sources


def _layer(entries: dict[str, Entry], site: Site) -> QuantLinear:
    n, k = shape_of(site.module)
    entry, bias = entries[join(site.name, "weight")], entries.get(join(site.name, "bias"))
    blocks = torch.from_numpy(numpy.array(entry.data).reshape(n, k // GROUP, -1))  # (N, groups, bytes of a block)
    if entry.rows is not None:
        blocks = blocks[entry.rows]
    scale, header, offset = _float16(blocks, 0), 2, None
    if BITS[entry.type] == 8:
        codes = blocks[..., header:].contiguous().view(torch.int8)
    else:
        if entry.type == "Q4_1":
            offset, header = _float16(blocks, 2).float() + 8 * scale.float(), 4
        both = blocks[..., header:]
        codes = torch.cat((both & 15, both >> 4), -1).view(torch.int8) - 8  # the low nibbles are the first 16 weights
    return weight_only(
        codes.flatten(1),
        scale,
        None,
        GROUP,
        BITS[entry.type],
        site.module.weight.dtype,
        offset=offset,
        bias=None if bias is None else _dequantized(bias),
    )


def _float16(blocks: Tensor, start: int) -> Tensor:
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _dequantized(entry: Entry) -> Tensor:
    import gguf

    floats = gguf.dequantize(entry.data, entry.kind)
    tensor = torch.from_numpy(numpy.array(floats, dtype=numpy.float32)).reshape(entry.shape)
    return tensor if entry.rows is None else tensor[entry.rows]


def _report(path: Path, layers: int, sources: dict[str, str], entries: dict[str, Entry]) -> None:
    kinds = defaultdict(list)
    for name, source in sources.items():
        if entries[source].type not in FLOATS:
            kinds[entries[source].type].append(name)
    if kinds:
        said = "; ".join(f"{kind}: {some(names)}" for kind, names in sorted(kinds.items()))
        warnings.warn(f"{path.name}: {layers} layers keep their codes, and these are float now ({said})", stacklevel=4)
