"""Plots of measured layers: gain over the number of tokens, and the roofline. Needs matplotlib (extra `report`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import roofline
from .layer_table import name_of, short_type

Row = dict[str, Any]
MARKERS = "osD^vP*X<>hd"
OURS = ("qgraft", "torch")
BRIGHT = (*(f"C{i}" for i in range(10)), "navy", "gold")  # a color for each layer: there are more than ten
MUTED = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666")


def gain(rows: Sequence[Row], path: Path, title: str) -> None:
    """Gain over F.linear for each number of tokens, a line for each layer; rows: of one shape and input type."""
    figure = _figure(title)
    axes = figure.subplots()
    lines = _lines([row for row in rows if "ratio" in row and row["library"] != "torch"])
    styles = _styles(lines)
    for name, line in lines.items():
        axes.plot([row["tokens"] for row in line], [row["ratio"] for row in line], label=name, **styles[name])
    axes.axhline(1, color="black", linewidth=1, label="F.linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(tokens := sorted({row["tokens"] for row in rows}), [str(m) for m in tokens])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens (rows of the input)")
    axes.set_ylabel("gain: time of F.linear / time of the layer")
    _legend(axes)
    _save(figure, path)


def roof(rows: Sequence[Row], ceilings: roofline.Ceilings, path: Path, title: str) -> None:
    """Rate over operations per byte moved, a point for each number of tokens, under the measured limits. Ours and
    F.linear only: with every peer nothing could be seen."""
    figure = _figure(title)
    axes = figure.subplots()
    measured = [row for row in rows if "tflops" in row and row["library"] in OURS]
    work = [2 * row["tokens"] * row["shape"][0] * row["shape"][1] / row["bytes_moved"] for row in measured]
    ends = (min(work) / 2, max(work) * 2)
    slope = roofline.bandwidth(ceilings) / 1e3  # TB/s times operations per byte is TFLOP/s
    peaks = ceilings["matmul_tflops"]
    for kind, peak in peaks.items():
        corner = min(max(peak / slope, ends[0]), ends[1])
        xs = (ends[0], corner, ends[1])
        axes.plot(xs, [min(slope * x, peak) for x in xs], color="gray", linewidth=1)
        # Labels of limits that lie close together stay apart.
        side = "bottom" if peak == max(peaks.values()) else "top"
        axes.annotate(f"{short_type(kind)} {peak:.3g}", (ends[1], min(slope * ends[1], peak)), ha="right", va=side)
    at = {id(row): x for row, x in zip(measured, work, strict=True)}
    lines = _lines(measured)
    styles = _styles(lines)
    for name, line in lines.items():
        axes.plot([at[id(row)] for row in line], [row["tflops"] for row in line], label=name, **styles[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights, input and output")
    axes.set_ylabel("TFLOP/s (int8: 10^12 operations/s)")
    _legend(axes)
    _save(figure, path)


def speeds(rows: Sequence[Row], path: Path, title: str) -> None:
    """Tokens per second of whole models, a pair of bars for each."""
    names = list(rows[0]["speeds"])
    figure = _figure(title, height=1.5 + 0.22 * len(rows))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    labels = [f"{name_of(row)} {short_type(row['dtype'])}" for row in rows]
    colors = [_color(row) for row in rows]
    for axis, name in zip(panels, names, strict=True):
        axis.barh(labels, [row["speeds"][name]["tokens_per_s"] for row in rows], color=colors)
        axis.set_xlabel(f"{name}, tokens per second")
    panels[0].invert_yaxis()
    _save(figure, path)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        lines.setdefault(f"{name_of(row)} {short_type(row['dtype'])}", []).append(row)
    return lines


def _color(row: Row) -> str:
    return {"qgraft": "tab:blue", "torch": "black"}.get(row["library"], "silver")


def _styles(lines: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
    """Ours stand out: thick, solid, bright. Others are thin and dashed, a color for each library."""
    libraries = list(dict.fromkeys(line[0]["library"] for line in lines.values() if line[0]["library"] not in OURS))
    styles, ours = {}, 0
    for i, (name, line) in enumerate(lines.items()):
        style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1, "linestyle": "--"}
        if line[0]["library"] == "qgraft":
            style |= {"color": BRIGHT[ours % len(BRIGHT)], "markersize": 5, "linewidth": 2, "linestyle": "-"}
            ours += 1
        elif line[0]["library"] == "torch":
            style["color"] = "black"
        else:
            style["color"] = MUTED[libraries.index(line[0]["library"]) % len(MUTED)]
        styles[name] = style
    return styles


def _figure(title: str, height: float = 5.0) -> Any:
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def _legend(axes: Any) -> None:
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    # The same numbers give the same bytes: nothing to commit if nothing has changed.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
