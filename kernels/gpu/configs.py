"""Which tile a kernel runs with.

In this order: what `qgraft warmup --tune` or a first use measured on this very device (in the user's cache folder), the
table that ships for the device (`configs/*.json`), and else the rule that stands in the kernel's own file.

A table is {"devices": [part of a device's name, ..], "measured": bool, "matmul_from": {kernel: tokens}, "rows": [row,
..]}; the first row that fits is taken:

    {"kernel": "w8a16", "min_m": 1, "max_m": 16, "n": 4096, "k": 4096, "tile": {"BLOCK_N": 64, ..}}

min_m, max_m, n and k are optional; what the tile leaves out stays as the rule has it. Rows hold for layers whose rows
of weights are aligned (K a multiple of 32); all others go by the rule.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from . import common

SHIPPED = Path(__file__).parent / "configs"
# From so many tokens a layer dequantizes its weights and leaves the product to cuBLAS or hipBLAS. Not measured yet:
# where others have put the switch.
MATMUL_FROM = 1024

# For `tuning`: the tile that is being tried, by kernel, and who notes which tiles are asked for.
trial: dict[str, dict] = {}
asked: list[tuple[str, int, int, int, dict]] | None = None


def tile(kernel: str, x: Tensor, m: int, n: int, k: int, rule: Callable[..., dict], *args) -> dict:
    """The tile of a kernel for m tokens of x and a layer of n x k; `rule(*args)` where no table has one."""
    if kernel in trial:
        return rule(*args) | trial[kernel]
    found = _tile(kernel, device_name(x), m, n, k, rule, args)
    if asked is not None:
        asked.append((kernel, m, n, k, found))
    return found


@functools.lru_cache(maxsize=8192)
def _tile(kernel: str, device: str, m: int, n: int, k: int, rule: Callable[..., dict], args: tuple) -> dict:
    row = _row(tables(device), kernel, m, n, k)
    return rule(*args) | (row["tile"] if row else {})


def _row(found: list[dict], kernel: str, m: int, n: int, k: int) -> dict | None:
    if k % 32:
        return None
    for row in (row for table in found for row in table["rows"]):
        here = row["kernel"] == kernel and row.get("min_m", 1) <= m <= row.get("max_m", m)
        if here and (row.get("n", n), row.get("k", k)) == (n, k):
            return row
    return None


def was_measured(device: str, kernel: str, m: int, n: int, k: int) -> bool:
    """Whether a table says so of the tile for this case. True where no table may say anything."""
    return k % 32 != 0 or _row([table for table in tables(device) if table["measured"]], kernel, m, n, k) is not None


def matmul_from(kernel: str, x: Tensor) -> int:
    """See MATMUL_FROM."""
    return _matmul_from(kernel, device_name(x))


@functools.lru_cache(maxsize=256)
def _matmul_from(kernel: str, device: str) -> int:
    for table in tables(device):
        if kernel in table.get("matmul_from", {}):
            return table["matmul_from"][kernel]
    return MATMUL_FROM


def device_name(x: Tensor) -> str:
    """The name by which tables are found; empty where there is no device."""
    if common.pretended is not None:
        return common.pretended.table or ""
    return _device_name(x.device.index) if x.is_cuda else ""


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def tables(device: str) -> list[dict]:
    """The tables for a device, the one that counts first in front."""
    found = []
    if device:
        mine = cache_file(device)
        if mine.is_file():
            try:
                found.append(checked(json.loads(mine.read_text(encoding="utf-8"))))
            except (ValueError, KeyError, TypeError, OSError) as error:
                warnings.warn(
                    f"qgraft: {mine} cannot be used ({error}), so untuned tiles are; "
                    "delete it, or run `qgraft warmup --tune` again",
                    stacklevel=2,
                )
        shipped = [checked(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(SHIPPED.glob("*.json"))]
        found += [table for table in shipped if any(part in device for part in table["devices"])]
    return found


def checked(table: dict) -> dict:
    """The table. ValueError if a row is not what it should be: a tile is not the place for a surprise."""
    for row in table["rows"]:
        if not isinstance(row["kernel"], str) or not all(type(row.get(key, 1)) is int for key in ROW_NUMBERS):
            raise ValueError(f"row {row} is not a row of a table")
        if not all(re.fullmatch(r"BLOCK_\w|num_\w+", key) and type(value) is int for key, value in row["tile"].items()):
            raise ValueError(f"tile {row['tile']} is not a tile")
    return table


ROW_NUMBERS = ("min_m", "max_m", "n", "k")


def cache_file(device: str) -> Path:
    """Where `qgraft warmup --tune` keeps what it found for a device and this version of Triton."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgraft"
    return root / f"tiles-{re.sub(r'[^A-Za-z0-9]+', '-', device)}-triton-{triton.__version__}.json"


def forget() -> None:
    """Read the tables again at the next call."""
    for cached in (tables, _tile, _matmul_from):
        cached.cache_clear()
