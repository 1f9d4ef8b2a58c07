"""Plan and report as rich tables that stay readable at 80 columns."""

from __future__ import annotations

import io
import math
import re
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..layers import EMBEDDINGS
from .names import LAYER, Name, narrowed

if TYPE_CHECKING:
    from .plan import Plan
    from .report import Report

MOST_COLUMNS = 100
# Attributes of a LayerReport whose sum or mean stands for several layers.
SUMMED = ("weight_error", "output_sqnr", "bytes_before", "bytes_after", "seconds")


def size(total: float) -> str:
    """Bytes in words: '12.3 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(total) < 1024 or unit == "GiB":
            # Halves up, as JavaScript and Vega have it: a page shows numbers of all three.
            return f"{total:.0f} B" if unit == "B" else f"{math.floor(10 * total + 0.5) / 10:.1f} {unit}"
        total /= 1024
    raise AssertionError("unreachable")


def count(n: int, what: str) -> str:
    """'1 layer', '2 layers'."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def text_width() -> int:
    """Columns for plain text: those of the terminal, but no more than are read with ease."""
    return min(shutil.get_terminal_size((MOST_COLUMNS, 24)).columns, MOST_COLUMNS)


def to_text(table: Table) -> str:
    """The table as plain text without colours."""
    console = Console(file=io.StringIO(), width=text_width(), color_system=None)
    narrowed(table, console.width)
    console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def plan_table(plan: Plan, every: bool = False) -> Table:
    saved = 100 * (1 - plan.bytes_after / plan.bytes_before) if plan.bytes_before else 0.0
    caption = [
        f"{len(plan.todo)} of {len(plan.layers)} {_kinds(plan)}, {100 * plan.coverage:.1f} % of the weights: "
        f"{size(plan.bytes_before)} -> {size(plan.bytes_after)} ({saved:.0f} % less)",
        *_uncovered_lines(plan),
        *plan.notes,
    ]
    title = Text(f"Plan of recipe {plan.recipe.name}", "table.title")
    table = layer_table(title, "\n".join(caption))
    table.add_column("shape", no_wrap=True)
    table.add_column("scheme or reason", overflow="fold", ratio=5)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    rows = []
    for layer in plan.layers:
        what = layer.reason if layer.scheme is None or layer.already else _scheme_text(layer)
        shape = f"{layer.out_features}x{layer.in_features}"
        shared = f" (shared by {len(layer.names)})" if len(layer.names) > 1 else ""
        key = (shape, what, f"{layer.bits_per_weight:.2f}", shared)
        rows.append((layer.name or "(the model)", key, (layer.bytes_before, layer.bytes_after)))
    for names, (shape, what, bits, shared), sums in collapse(rows, every):
        add_layer(table, names + shared, shape, what, bits, size(sums[0]), size(sums[1]))
    return table


def report_table(report: Report, every: bool = False) -> Table:
    table = layer_table("Report", report.summary())
    table.add_column("scheme", overflow="fold", ratio=3)
    for column in ("weight\nerror", "output\nSQNR", "before", "after", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [(r.name or "(the model)", (r.scheme,), tuple(getattr(r, s) for s in SUMMED)) for r in report.layers]
    for names, (scheme,), sums in collapse([(n, key, (1, *values)) for n, key, values in rows], every):
        layers, error, sqnr, before, after, seconds = sums
        decibel = "-" if sqnr is None else f"{sqnr / layers:.1f} dB"
        add_layer(
            table,
            names,
            scheme,
            f"{100 * error / layers:.2f} %",
            decibel,
            size(before),
            size(after),
            f"{seconds:.2f}",
        )
    return table


def layer_table(title: str | Text | None, caption: str) -> Table:
    """Without lines between columns: in 80 columns the names need the room."""
    box, text = SIMPLE_HEAD, Text(caption, "table.caption")
    table = Table(title=title, caption=text, caption_justify="left", box=box, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(LAYER, overflow="fold", ratio=5)
    return table


def add_layer(table: Table, name: str, *cells: str) -> None:
    # As Text, not str: rich would read the "[...]" of a module's name as markup.
    table.add_row(Name(name), *map(Text, cells))


def collapse(rows: Iterable[tuple[str, tuple, tuple]], every: bool = False) -> list[tuple[str, tuple, tuple[Any, ...]]]:
    """Join rows whose names differ only in numbers: layers.0.fc, layers.1.fc -> layers.{0-1}.fc x2.

    Each row is (name, key, sums): rows join if name pattern and key are the same, and their sums are added
    (None if any is None).
    """
    joined: dict[tuple, tuple[list[str], list[Any]]] = {}
    for name, key, sums in rows:
        pattern = name if every else tuple(re.split(r"\d+", name))
        names, totals = joined.setdefault((pattern, key), ([], [0] * len(sums)))
        names.append(name)
        for i, value in enumerate(sums):
            totals[i] = None if value is None or totals[i] is None else totals[i] + value
    return [(_join(names), key, tuple(totals)) for (_, key), (names, totals) in joined.items()]


def _join(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    texts = re.split(r"\d+", names[0])
    columns = zip(*(re.findall(r"\d+", name) for name in names), strict=True)
    parts = [texts[0]]
    for numbers, text in zip(columns, texts[1:], strict=True):
        parts += [_ranges(sorted({int(n) for n in numbers})), text]
    return f"{''.join(parts)} x{len(names)}"


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return "{" + text + "}"


def _scheme_text(layer) -> str:
    set_options = {k: v for k, v in layer.scheme if v != type(layer.scheme).model_fields[k].default}
    options = ", ".join(f"{k}={v}" for k, v in set_options.items())
    return layer.scheme_name + (f" ({options})" if options else "") + _how_tied(layer)


def _kinds(plan: Plan) -> str:
    named = any(layer.scheme_name in EMBEDDINGS for layer in plan.layers)
    return "linear layers and embeddings" if named else "linear layers"


def _how_tied(layer) -> str:
    return f" (codes of {layer.codes_of})" if layer.codes_of else " (untied)" if layer.reason else ""


def _uncovered_lines(plan: Plan) -> list[str]:
    if not plan.uncovered:
        return []
    kinds: dict[str, int] = {}
    for u in plan.uncovered:
        kinds[u.kind] = kinds.get(u.kind, 0) + u.numel
    parts = [f"{kind} {100 * n / plan.total_weights:.1f} %" for kind, n in sorted(kinds.items(), key=lambda i: -i[1])]
    return ["Not in linear layers: " + ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")]
