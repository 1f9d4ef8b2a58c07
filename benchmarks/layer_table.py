"""The results of one weight shape, and the verdicts of a run, as tables of 100 columns."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from .targets import Verdict

NOTE = (
    "error: relative, in float64, to the layer's own formula / to the float layer. ms: median, and 10th to 90th "
    "percentile. GB/s: weights, input and output, each once. roof: share of what this machine can do at best "
    "(memory or arithmetic, whichever binds). peak: MiB that a call adds. gain: time of F.linear in the input's "
    "type / time of the layer; more than 1 is faster."
)
TITLES = ("layer", "in", "rows", "error", "ms", "p10-p90", "GB/s", "TF/s", "roof", "peak", "gain")


def short_type(name: str) -> str:
    """fp32 for float32, bf16 for bfloat16."""
    return name.replace("bfloat", "bf").replace("float", "fp")


def name_of(row: dict[str, Any]) -> str:
    """A layer of ours by its scheme, others with the library before it."""
    return row["scheme"] if row["library"] in ("qgraft", "torch") else f"{row['library']} {row['scheme']}"


def plain_table(titles: Sequence[str], caption: str | None = None, folding: int = 1) -> Table:
    """A table without lines; two columns of words, then numbers. The first `folding` columns may fold, others never."""
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < 2 else "right", no_wrap=i >= folding, overflow="fold")
    return table


def layer_table(rows: Sequence[dict[str, Any]]) -> Table:
    """rows: as in the JSON, all of one shape, by number of tokens."""
    eager = any("eager" in row for row in rows)
    table = plain_table((*TITLES[:6], *["eager"] * eager, *TITLES[6:]), NOTE)
    tokens = rows[0]["tokens"] if rows else 0
    for row in rows:
        if row["tokens"] != tokens:
            table.add_section()
            tokens = row["tokens"]
        table.add_row(*_cells(row, eager))
    return table


def memory_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What each layer of one shape takes, in MiB."""
    caption = (
        "MiB. made: its tensors when made. held: its tensors after use with every number of rows, packed copies "
        "included. resident: what the process has grown by for it. of float: held / F.linear in the same type."
    )
    table = plain_table(("layer", "in", "made", "held", "resident", "of float"), caption)
    floats = {row["dtype"]: row["held_bytes"] for row in rows if row["library"] == "torch"}
    last = {(name_of(row), row["dtype"]): row for row in rows}
    for (name, dtype), row in last.items():
        share = f"{row['held_bytes'] / floats[dtype]:.2f}"
        sizes = (_mib(row[key]) for key in ("weight_bytes", "held_bytes", "resident_bytes"))
        table.add_row(name, short_type(dtype), *sizes, share)
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A line for each target and scheme, a column for each number of tokens: measured / to reach."""
    tokens = sorted({v.tokens for v in verdicts})
    table = plain_table(("target", "layer", *(f"M={m}" for m in tokens)), folding=len(tokens) + 2)
    lines: dict[tuple, dict[int, Verdict]] = {}
    for v in verdicts:
        # "ratio" and "error" need no name beside the label.
        what = v.target.label if v.target.measure in ("ratio", "error") else f"{v.target.label}, {v.target.measure}"
        key = (what, f"{v.scheme} {short_type(v.target.dtype)}")
        lines.setdefault(key, {})[v.tokens] = v
    for key, cells in lines.items():
        table.add_row(*key, *(verdict_cell(cells[m]) if m in cells else "" for m in tokens))
    return table


def verdict_cell(v: Verdict) -> str:
    """Such as: ok 2.71/2.5."""
    sign = {True: "ok", False: "NO", None: "?"}[v.ok]
    is_error = v.target.measure == "error"
    value = "-" if v.value is None else f"{v.value:.0e}" if is_error else f"{v.value:.2f}"
    return f"{sign} {value}/{v.limit:.0e}" if is_error else f"{sign} {value}/{v.limit:g}"


def _cells(row: dict[str, Any], eager: bool) -> list[str]:
    formula = "-" if row["error_formula"] is None else f"{row['error_formula']:.0e}"
    head = [name_of(row), short_type(row["dtype"]), str(row["tokens"]), f"{formula}/{row['error_weights']:.3f}"]
    peak = _mib(row["peak_bytes"])
    if "median_ms" not in row:
        return [*head, "WRONG" if "reason" not in row else "-", "", *[""] * eager, "", "", "", peak, "-"]
    return [
        *head,
        f"{row['median_ms']:.3g}",
        f"{row['p10_ms']:.3g}-{row['p90_ms']:.3g}",
        *([f"{row['eager']['median_ms']:.3g}"] if eager else []),
        f"{row['gb_per_s']:.3g}",
        f"{row['tflops']:.2g}",
        "-" if row["roof_share"] is None else f"{row['roof_share']:.0%}",
        peak,
        f"{row['ratio']:.2f}x",
    ]


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}" if count < 100 << 20 else f"{count / 2**20:.0f}"
