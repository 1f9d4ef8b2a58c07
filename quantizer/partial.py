"""The folder of a run that is not finished: what is in it survives a kill, and the next run goes on from there.

    .out.partial/job.json         what is made from what; a run with another job does not touch the folder
    .out.partial/parts/00007...   the tensors of some layers, and in the file's metadata what became of each layer
    .out.partial/checkpoint/      weight files of the result, each complete

Every file gets its name only when it is complete.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import read_json, write_shard
from .errors import CheckpointError
from .weight_files import read_kinds, read_named

ROWS = "qgraft"


@dataclass(frozen=True)
class Row:
    """What became of one layer; left: why it stayed as it was, or ""."""

    name: str
    scheme: str = ""
    options: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    left: str = ""


class Partial:
    """path: where the result will be."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.root = self.path.with_name(f".{self.path.name}.partial")
        self.job, self.parts, self.checkpoint, self.lock = (
            self.root / name for name in ("job.json", "parts", "checkpoint", "lock")
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other run writes to the same path. CheckpointError if one does.

        After an error the folder is gone if there was nothing in it worth keeping.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock, timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):  # or it ends just now, and clears the folder away
            raise CheckpointError(f"{self.path}: another process is writing it; wait, or stop that one") from None
        try:
            yield
        except BaseException:
            if not any(self.parts.glob("*")):
                self.done()
            raise
        finally:
            lock.release()

    def begin(self, job: dict[str, Any]) -> None:
        """Begin, or go on. CheckpointError if the folder holds the beginning of something else."""
        job = json.loads(json.dumps(job, default=str))
        old = self.checkpoint.with_name("checkpoint.old")  # stopped in the middle of the last step
        if old.exists() and not self.path.exists():
            os.replace(old, self.path)
        if self.job.exists():
            was = read_json(self.job)
            differs = [key for key in {**was, **job} if job.get(key) != was.get(key)]
            if differs:
                raise CheckpointError(
                    f"{self.root}: holds an unfinished run that differs from this one in {', '.join(differs)}; "
                    "finish that one, or delete the folder"
                )
        else:  # what is here was being cleared away when that was stopped: nobody knows what it was made from
            _remove(self.parts, self.checkpoint)
        known = {self.job, self.parts, self.checkpoint, self.lock}
        _remove(*(file for file in self.root.iterdir() if file not in known))  # that were being written, and `old`
        for folder in (self.parts, self.checkpoint):
            folder.mkdir(parents=True, exist_ok=True)
        self._write(self.job, lambda file: file.write_text(json.dumps(job), encoding="utf-8"))

    def part(self, index: int) -> Path:
        return self.parts / f"{index:05d}.safetensors"

    def has_part(self, index: int) -> bool:
        try:
            with safe_open(self.part(index), framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False

    def write_part(self, index: int, tensors: dict[str, Tensor], rows: Iterable[Row]) -> None:
        about = {ROWS: json.dumps([asdict(row) for row in rows])}
        self._write(self.part(index), lambda file: save_file(tensors, file, metadata=about))

    def read_part(self, index: int) -> tuple[dict[str, Tensor], list[Row]]:
        """What `write_part` wrote."""
        with safe_open(self.part(index), framework="pt") as stream:
            rows = [Row(**row) for row in json.loads(stream.metadata()[ROWS])]
            return {name: stream.get_tensor(name) for name in stream.keys()}, rows  # noqa: SIM118

    def write_shard(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._write(self.checkpoint / name, lambda file: write_shard(file, tensors))

    def _write(self, file: Path, write: Callable[[Path], object]) -> None:
        new = self.root / f"{file.name}.{os.getpid()}.new"
        try:
            write(new)
            os.replace(new, file)
        except SafetensorError as error:  # a full disk, most of all
            raise CheckpointError(f"{file}: cannot be written: {error}") from None
        finally:
            new.unlink(missing_ok=True)

    def rows(self) -> dict[str, Row]:
        """What became of each layer, by name."""
        found = {}
        for file in self._files:
            with safe_open(file, framework="pt") as stream:
                rows = [Row(**row) for row in json.loads(stream.metadata()[ROWS])]
            found.update({row.name: row for row in rows})
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor in the parts, once they are all there."""
        return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in read_kinds(self._files).items()}

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        return {name: file for file in self._files for name in read_kinds([file])}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return read_named(names, self._file_of)

    @property
    def _files(self) -> list[Path]:
        return sorted(self.parts.iterdir())

    def clear_checkpoint(self, shards: Iterable[str]) -> None:
        """Keep these weight files only: all else, files of others too, is put there again, and may be half written."""
        _remove(*(file for file in self.checkpoint.iterdir() if file.name not in shards))

    def done(self) -> None:
        with suppress(OSError):
            self.job.unlink()  # first: without it nothing that is left counts
        shutil.rmtree(self.root, ignore_errors=True)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
