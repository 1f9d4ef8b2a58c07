"""The accuracy table: what was asked for, what was measured, and whether the one is as good as the other."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from .yardsticks import Yardstick, yardsticks

Row = dict[str, Any]

# The most that a recipe may lose, by the model's main metric.
TARGETS = {
    "smollm2": {
        "w8a32": 1.003, "w8a16": 1.003, "w8a8": 1.02, "w4a8_svd": 1.05, "w4a4_svd": 1.15, "w4a16": 1.08,
    },
    "minilm": {
        "w8a32": 0.0008, "w8a16": 0.0008, "w8a8": 0.0025, "w4a8_svd": 0.006, "w4a4_svd": 0.013, "w4a16": 0.010,
    },
}  # fmt: skip
SAME_BITS = 0.005  # of the bits: a bias or a zero point more or less is no other size


def judge(rows: Sequence[Row]) -> None:
    """Add to each row of ours its target, whether it is met, and the best peer of no more bits."""
    for row in rows:
        for key in ("target", "met", "best_peer", "beats_peers"):
            row.pop(key, None)
        if row["library"] != "qgraft":
            continue
        loss = _loss(row)
        target = TARGETS.get(row["model"], {}).get(row["name"])
        if target is not None:
            row |= {"target": target, "met": loss <= target}  # not met where it is not a number
        rivals = [
            other for other in rows
            if other["model"] == row["model"] and other["library"] not in ("qgraft", "torch")
            and other["bits"] <= (1 + SAME_BITS) * row["bits"] and not math.isnan(_loss(other))
        ]  # fmt: skip
        if rivals:
            best = min(rivals, key=_loss)
            row |= {"best_peer": best["name"], "beats_peers": loss <= _loss(best)}


def tables(rows: Sequence[Row], names: Iterable[str]) -> list[Table]:
    """A table for each model, by bits and then by what is lost."""
    return [_table(yardsticks()[name], [r for r in rows if r["model"] == name]) for name in names]


def _table(yardstick: Yardstick, rows: list[Row]) -> Table:
    caption = yardstick.setting + ". bits: of a weight of the quantized layers, with scales and branch."
    table = Table(title=yardstick.title, caption=caption, caption_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    for title in ("bits", "MiB", *yardstick.metrics, "seconds", "target", "best peer of no more bits"):
        table.add_column(title, justify="right")
    for row in sorted(rows, key=lambda r: (round(r["bits"], 1), r["library"] != "qgraft", _loss(r))):
        scores = [show(row["scores"][metric]) for metric in yardstick.metrics]
        target = f"{row['target']:g} {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
        rival = f"{row['best_peer']} {'beaten' if row['beats_peers'] else 'BETTER'}" if "best_peer" in row else ""
        size = f"{row['model_bytes'] / 2**20:.0f}"
        label = row["name"] if row["library"] != "qgraft" else f"qgraft {row['name']}"
        table.add_row(label, f"{row['bits']:.2f}", size, *scores, f"{row['seconds']:.0f}", target, rival)
    return table


def show(value: float | None) -> str:
    """Four digits that say something; a ratio near 1 gets its own. None is not a number."""
    if value is None:
        return "nan"
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.4g}"


def _loss(row: Row) -> float:
    value = row["scores"][yardsticks()[row["model"]].main]
    return math.nan if value is None else value
