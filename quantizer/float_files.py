"""The float weights of a model as they lie in safetensors files, read a few tensors at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .checkpoint import INDEX, WEIGHTS, read_json
from .errors import CheckpointError, some
from .surgery import FLOATS
from .weight_files import Kind, read_kinds, read_named


class CannotStream(CheckpointError):
    """These files do not hold this model tensor by tensor; loading it as a whole may work."""


@dataclass(frozen=True)
class Origin:
    """Which tensors of the files one or several tensors of the model are made from.

    make: the files' tensors, by their names there, to the model's, by theirs; None where one is the other.
    """

    keys: tuple[str, ...]
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


# From the model and the names in the files to the origin of each tensor of the model that is in them.
Naming = Callable[[nn.Module, Iterable[str]], dict[str, Origin]]


def same_names(model: nn.Module, keys: Iterable[str]) -> dict[str, Origin]:
    """The files use the names of the model's own state."""
    return {key: Origin((key,)) for key in keys}


class FloatFiles:
    """model.safetensors, or the files of model.safetensors.index.json, as the state of `model`.

    model: on meta; its dtypes are what the tensors are read as, its own tensors that are not on meta stand for
    those that no file holds. It is not changed.
    Raises CannotStream if a tensor is in no file, CheckpointError for files that cannot be read.
    """

    def __init__(self, folder: Path, model: nn.Module, naming: Naming = same_names):
        self.folder = folder
        self.file_of = _files(folder)
        self.state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.kinds = self._read_kinds()
        self.origins = {n: o for n, o in naming(model, self.file_of).items() if n in self.state}
        self._let_ties_share()
        self._check()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the model's state by name, in its dtypes, on the CPU; most are views of the mapped file."""
        names = list(names)
        origins = {origin: None for name in names if (origin := self.origins.get(name)) is not None}
        tensors = read_named({key: None for origin in origins for key in origin.keys}, self.file_of)
        found = {name: self.state[name] for name in names if name not in self.origins}
        for origin in origins:
            group = [name for name in names if self.origins.get(name) == origin]
            found.update(self._make(origin, group, {key: tensors.pop(key) for key in origin.keys}))
        return {name: found[name].detach().to(self.state[name].dtype) for name in names}

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of each file: whether they are still those of an earlier run."""
        files = sorted({*self.file_of.values()})
        return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}

    def _make(self, origin: Origin, names: list[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if origin.make is None:
            return dict.fromkeys(names, tensors[origin.keys[0]])
        try:
            made = origin.make(tensors)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.folder}: {some(names)} cannot be made from the files: {what}") from error
        for name in names:
            if name not in made or made[name].shape != self.state[name].shape:
                got = tuple(made[name].shape) if name in made else "nothing"
                raise CheckpointError(
                    f"{self.folder}: {name!r} is {tuple(self.state[name].shape)} in the model, {got} from the files"
                )
        return made

    def _read_kinds(self) -> dict[str, Kind]:
        """Shape and type of every tensor in the files; damaged files are found here, before the work begins."""
        kinds = read_kinds(sorted({*self.file_of.values()}))
        absent = sorted(self.file_of.keys() - kinds.keys())
        if absent:
            raise CheckpointError(f"{self.folder / INDEX}: names tensors that its files do not hold: {some(absent)}")
        return kinds

    def _let_ties_share(self) -> None:
        """A tied tensor is read under whichever of its names is in the files."""
        owners: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.state.items():
            owners[id(tensor)].append(name)
        for names in owners.values():
            there = [name for name in names if name in self.origins]
            if len(names) == 1 or not there:
                continue
            if any(self.origins[name].make is not None for name in there):
                raise CannotStream(f"{self.folder}: {some(names)} are tied, and made from other tensors of the files")
            first = self.read(there[:1])[there[0]]
            for other in there[1:]:
                if not torch.equal(first, self.read([other])[other]):
                    raise CannotStream(f"{self.folder}: {there[0]!r} and {other!r} are tied, and differ in the files")
            self.origins.update(dict.fromkeys(names, self.origins[there[0]]))

    def _check(self) -> None:
        missing = [n for n, t in self.state.items() if n not in self.origins and t.is_meta]
        if missing:
            raise CannotStream(f"{self.folder}: the files do not hold {len(missing)} tensors: {some(missing)}")
        problems = []
        for name, origin in self.origins.items():
            shape, wanted = self.kinds[origin.keys[0]][0], self.state[name]
            others = [dtype for key in origin.keys if (dtype := self.kinds[key][1]) not in FLOATS]
            if origin.make is None and shape != tuple(wanted.shape):
                problems.append(f"{name!r} has shape {shape} in the files, {tuple(wanted.shape)} in the model")
            elif wanted.dtype in FLOATS and others:
                problems.append(f"{name!r} is {others[0] or 'of an unknown type'} in the files, not float")
        if problems:
            raise CheckpointError(f"{self.folder}: {some(problems)}")


def float_dtype(folder: Path) -> torch.dtype | None:
    """The type of the float tensors in a folder of safetensors; None if there are none, or of several types."""
    try:
        kinds = read_kinds(sorted({*_files(folder).values()}))
    except CannotStream:
        return None
    found = {dtype for _, dtype in kinds.values() if dtype in FLOATS}
    return found.pop() if len(found) == 1 else None


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> its file. What transformers would take first is taken first."""
    if (folder / WEIGHTS).is_file():
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as stream:
                return dict.fromkeys(stream.keys(), folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / WEIGHTS}: no readable safetensors file: {error}") from None
    if not (folder / INDEX).is_file():
        raise CannotStream(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    strange = sorted({str(f) for f in weight_map.values() if not _is_plain(f)})
    if strange:
        raise CheckpointError(f"{folder / INDEX}: names files outside of the folder, refused: {some(strange)}")
    return {key: folder / file for key, file in weight_map.items()}


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")
