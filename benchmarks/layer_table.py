"""The results of one weight shape as a table of 100 columns."""

from typing import Any

from rich import box
from rich.table import Table

from qgraft.quantizer.tables import size

NOTE = (
    "errors: relative, to the layer's own formula in float64 / to the float layer. ms: median (10th to 90th "
    "percentile). GB/s: weights, input and output. fp32, bf16: ms of F.linear. gain: time of F.linear in the "
    "input's type / time of the layer; more than 1 is faster."
)


def layer_table(rows: list[dict[str, Any]]) -> Table:
    """rows: as in the JSON, all of one shape."""
    eager = any("eager" in row for row in rows)
    table = Table(caption=NOTE, caption_justify="left", box=box.SIMPLE, pad_edge=False)
    titles = ["scheme", "input", "tokens", "errors", "ms", *["eager"] * eager, "GB/s", "fp32", "bf16", "gain"]
    for i, column in enumerate(titles):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    tokens = rows[0]["tokens"] if rows else 0
    for row in rows:
        if row["tokens"] != tokens:
            table.add_section()
            tokens = row["tokens"]
        table.add_row(*_cells(row, eager))
    return table


def sizes(rows: list[dict[str, Any]]) -> str:
    """What each scheme needs for the shape of the rows, beside F.linear in the same type."""
    texts = []
    for row in rows:
        ratio = row["float_bytes"] / row["weight_bytes"]
        texts.append(f"{row['scheme']} {size(row['weight_bytes'])} ({ratio:.1f}x less than {row['dtype']})")
    return ", ".join(dict.fromkeys(texts))


def _cells(row: dict[str, Any], eager: bool) -> list[str]:
    errors = f"{row['error_formula']:.0e} / {row['error_weights']:.3f}"
    dtype = row["dtype"].replace("bfloat", "bf").replace("float", "fp")
    head = [row["scheme"], dtype, str(row["tokens"]), errors]
    if row["ok"]:
        times = [f"{row['median_ms']:.3g} ({row['p10_ms']:.3g} to {row['p90_ms']:.3g})"]
        times += [f"{row['eager']['median_ms']:.3g}"] if eager else []
        times += [f"{row['gb_per_s']:.1f}"]
        ratio = f"{row['ratio']:.2f}x"
    else:
        times, ratio = ["WRONG", *["-"] * eager, "-"], "-"
    return [*head, *times, *(f"{base['median_ms']:.3g}" for base in row["baselines"].values()), ratio]
