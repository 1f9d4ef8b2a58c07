"""The weight files of a checkpoint: which they are, what they hold, and their tensors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import CONFIG, DTYPES, INDEX, WEIGHT_FILE, WEIGHTS, fingerprint_matches, read_json
from .errors import CheckpointError, some

BY_CODE = {code: dtype for dtype, code in DTYPES.items()}
ALIGNMENT = 64

Kind = tuple[tuple[int, ...], torch.dtype | None]  # shape and type; None: no type that `save` writes


def weight_files(path: Path, recorded: dict[str, dict]) -> list[Path]:
    """The weight files, all of which match their checksums; those of the index where nothing is recorded."""
    if not recorded:
        return _unrecorded(path)
    _check_file_names(path / CONFIG, [name for name in recorded if name != INDEX])
    raise_all(fingerprint_matches(path / name, entry) for name, entry in recorded.items())
    names = _in_index(path) if INDEX in recorded else [WEIGHTS]
    raise_all(f"{path / name}: not recorded in {CONFIG}" for name in names if name not in recorded)
    return [path / name for name in names]


def _unrecorded(path: Path) -> list[Path]:
    """As transformers chooses: one file goes before an index."""
    names = [WEIGHTS] if (path / WEIGHTS).is_file() or not (path / INDEX).is_file() else _in_index(path)
    raise_all(f"{path / name}: missing" for name in names if not (path / name).is_file())
    return [path / name for name in names]


def _in_index(path: Path) -> list[str]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    _check_file_names(path / INDEX, names)
    return names


def _check_file_names(where: Path, names: list[str]) -> None:
    strange = [repr(name) for name in names if not WEIGHT_FILE.fullmatch(name)]
    if strange:
        raise CheckpointError(f"{where}: names files that qgraft does not write, refused: {some(strange)}")


def read_kinds(files: list[Path]) -> dict[str, Kind]:
    """Shape and type, by name, of every tensor in the files; only their headers are read."""
    kinds: dict[str, Kind] = {}
    for file in files:
        with _open(file, "cpu") as stream:
            for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in kinds:
                    raise CheckpointError(f"{file}: holds {name!r}, which another file holds too")
                part = stream.get_slice(name)
                kinds[name] = tuple(part.get_shape()), BY_CODE.get(part.get_dtype())
    return kinds


@contextmanager
def _open(file: Path, device: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device=device) as stream:
            yield stream
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no readable safetensors file: {error}") from None


def read_tensors(files: list[Path], device: torch.device) -> dict[str, Tensor]:
    """Every tensor of the files, by name."""
    tensors = {}
    for file in files:
        with _open(file, str(device)) as stream:
            tensors.update({name: aligned(stream.get_tensor(name)) for name in stream.keys()})  # noqa: SIM118
    return tensors


def read_named(names: Iterable[str], file_of: Mapping[str, Path]) -> dict[str, Tensor]:
    """Some tensors, by name; each file is mapped once, and stays so as long as one of its tensors is held."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[file_of[name]].append(name)
    tensors = {}
    for file, group in by_file.items():
        with _open(file, "cpu") as stream:
            tensors.update({name: aligned(stream.get_tensor(name)) for name in group})
    return tensors


def aligned(tensor: Tensor) -> Tensor:
    """A tensor that begins where torch would let it begin; a file puts it anywhere, and fast kernels mind."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def raise_all(problems: Iterable[str], path: Path | None = None) -> None:
    """CheckpointError with all of the problems that are not empty, if there are any."""
    problems = [problem for problem in problems if problem]
    if problems:
        head = f"{path} is not for this model:\n" if path else ""
        raise CheckpointError(head + some(problems, "\n"))
