"""Tiles that were measured: at most eight of them tried for a kernel and a shape, the fastest kept on disk.

`qgraft warmup --tune` comes here, and `first_use`. An ordinary call compiles one tile and runs it.
"""

import json
import math
import os
import time
from collections.abc import Callable

import triton

from . import configs

CANDIDATES = 8
# A tile has to be this much faster than the one in use: less is within what two measurements differ by.
GAIN = 0.98


def candidates(tile: dict[str, int]) -> list[dict[str, int]]:
    """The tile in use, and its neighbours: wider and narrower, longer and shorter, deeper and shallower pipelines."""
    depth = next(name for name in ("BLOCK_K", "BLOCK_B", "BLOCK_W", "BLOCK_Q") if name in tile)

    def changed(**factors: float) -> dict[str, int]:
        return {name: int(value * factors.get(name, 1)) for name, value in tile.items()}

    found = [
        tile,
        changed(BLOCK_N=2, num_warps=2),
        changed(BLOCK_N=0.5, num_warps=0.5),
        changed(**{depth: 2}),
        changed(**{depth: 0.5}),
        tile | {"num_stages": tile["num_stages"] + 1},
        tile | {"num_stages": max(2, tile["num_stages"] - 1)},
        changed(**{"BLOCK_N": 2, depth: 0.5}),
    ]
    fit = [t for t in found if t["BLOCK_N"] >= 16 and t[depth] >= 32 and 1 <= t["num_warps"] <= 16]
    return list({json.dumps(t): t for t in fit}.values())[:CANDIDATES]


def seconds(run: Callable[[], object]) -> float:
    """The median time of a call on the device, with cold caches; infinity if it does not compile or does not fit."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median") / 1e3
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
        return float("inf")


def token_range(m: int) -> tuple[int, int]:
    """The numbers of tokens that a tile measured with m of them is for: up to 16 they are alike, then up to a power
    of two."""
    most = max(16, 1 << (m - 1).bit_length())
    return (1 if most == 16 else most // 2 + 1), most


def tune(
    run: Callable[[], object],
    clock: Callable[[Callable[[], object]], float] = seconds,
    untried_on: str = "",
    until: float = math.inf,
) -> list[dict]:
    """Call `run`, a layer's forward pass, with other tiles. Returns rows of a table for the kernels that gained.

    With `untried_on`, the name of a device, only for kernels that no table has measured there, and with a row for
    those that gained nothing, too. No tile is begun after `until`, on the clock of time.monotonic(), and nothing is
    said about a kernel whose tiles were not all tried.
    """
    configs.asked = []
    try:
        run()
        asked = configs.asked
    finally:
        configs.asked = None
    rows = []
    for kernel, m, n, k, tile in asked:
        if untried_on and configs.was_measured(untried_on, kernel, m, n, k):
            continue
        times = []
        try:
            for candidate in candidates(tile):
                if time.monotonic() > until:
                    return rows
                configs.trial[kernel] = candidate
                times.append((clock(run), candidate))
        finally:
            configs.trial.pop(kernel, None)
        (usual, _), (best, winner) = times[0], min(times, key=lambda pair: pair[0])
        if math.isinf(usual):  # no memory to measure in
            continue
        if not best < GAIN * usual:
            best, winner = usual, tile
        if untried_on or winner != tile:
            least, most = token_range(m)
            row = {"kernel": kernel, "min_m": least, "max_m": most, "n": n, "k": k}
            rows.append(row | {"tile": winner, "seconds": best, "seconds_before": usual})
    return rows


def keep(device: str, rows: list[dict]) -> None:
    """Put rows in front of those of the user's table for a device; it is replaced at once, never half written."""
    file = configs.cache_file(device)
    mine = [table for table in configs.tables(device) if table.get("mine")]
    fresh = {(row["kernel"], row["min_m"], row["n"], row["k"]) for row in rows}
    old = [row for table in mine for row in table["rows"]]
    old = [row for row in old if (row["kernel"], row["min_m"], row["n"], row["k"]) not in fresh]
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_suffix(f".{os.getpid()}.tmp")
    table = {"devices": [device], "measured": True, "mine": True, "rows": rows + old}
    work.write_text(json.dumps(table, indent=1), encoding="utf-8")
    os.replace(work, file)
    configs.forget()
