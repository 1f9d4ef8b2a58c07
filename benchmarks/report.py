"""Draw what was measured: a page of tables, and plots beside it.

    python -m qgraft.benchmarks.report benchmarks/results/cpu

Reads every JSON file of the folder that `run.py` or `end_to_end.py` wrote, and writes report.md and SVG files into
it. Nothing is measured here. A file that it cannot draw is named on the page.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import machine, plots, roofline
from .layer_table import name_of, short_type
from .targets import MEASURES

PAGE = "report.md"
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="with the JSON files, such as benchmarks/results/cpu")
    args = parser.parse_args(argv)
    try:
        page = draw(args.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    except ImportError:
        print("plots need matplotlib: pip install 'qgraft[report]'", file=sys.stderr)
        return 2
    print(page)
    return 0


def draw(folder: Path) -> Path:
    """Write the page and the plots; the path of the page. Raises FileNotFoundError if there is nothing to draw."""
    parts, left = [], []
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        kind = _kind(data)
        if kind is None:
            left.append(file.name)
        else:
            parts += [f"## {file.stem}", _origin(data), *kind(data, folder, file.stem)]
    if not parts:
        raise FileNotFoundError(f"{folder}: no results of a benchmark; run make bench first")
    if left:
        parts.append(f"Not drawn, because they hold neither layers nor models of this format: {', '.join(left)}.")
    page = folder / PAGE
    page.write_text("\n\n".join([f"# Measured on {folder.resolve().name}", *parts]) + "\n", encoding="utf-8")
    return page


def _kind(data: Any) -> Any:
    if isinstance(data, dict) and data.get("rows"):
        if "ceilings" in data:
            return _layers
        if "setting" in data and "peers" in data:
            return _models
    return None


def _origin(data: dict[str, Any]) -> str:
    peers = "".join(f", {name} {version}" for name, version in data["peers"].items())
    busy = data["machine"]["load_average"]
    load = "" if busy is None else f" Load average when it began: {busy}."
    return f"`{data['command']}` on {machine.in_words(data['machine'])}{peers}.{load}"


def _layers(data: dict[str, Any], folder: Path, stem: str) -> Iterable[str]:
    ceilings, rows = data["ceilings"], data["rows"]
    yield f"The machine by itself, {roofline.in_words(ceilings)}."
    if data["verdicts"]:
        yield from _targets(data["verdicts"])
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        name = "x".join(map(str, shape))
        these = [row for row in rows if tuple(row["shape"]) == shape]
        yield f"### {shape[0]} x {shape[1]}"
        for dtype in dict.fromkeys(row["dtype"] for row in these):
            typed = [row for row in these if row["dtype"] == dtype]
            yield f"Gain over F.linear, {dtype} input (more than 1 is faster), and what a layer takes:"
            yield _gains(typed)
            file = folder / f"{stem}-{name}-{short_type(dtype)}.svg"
            if any("ratio" in row and row["library"] != "torch" for row in typed):
                plots.gain(typed, file, f"{name}, {dtype} input")
                yield f"![gain over F.linear]({file.name})"
        if any("tflops" in row and row["library"] in plots.OURS for row in these):
            file = folder / f"{stem}-{name}-roof.svg"
            plots.roof(these, ceilings, file, f"{name}: rate under the measured limits")
            yield f"![roofline]({file.name})"
    yield from _not_run(data["not_run"])


def _models(data: dict[str, Any], folder: Path, stem: str) -> Iterable[str]:
    yield f"{data['model']}. {data['setting']} In brackets: to the float model of the same type."
    names = list(next(row["speeds"] for row in data["rows"] if "speeds" in row))
    lines = []
    for row in data["rows"]:
        speeds = [f"{s['tokens_per_s']:.1f} ({s['ratio']:.2f}x)" for s in row.get("speeds", {}).values()]
        head = [name_of(row), short_type(row["dtype"]), f"{row['bytes'] / 2**20:.0f}", f"{row['quality']:.2f}"]
        lines.append([*head, *(speeds or ["**wrong**"] * len(names))])
    yield _markdown(["model", "type", "MiB", data["quality"], *(f"{name} tok/s" for name in names)], lines, left=2)
    file = folder / f"{stem}-speeds.svg"
    plots.speeds([row for row in data["rows"] if "speeds" in row], file, f"{data['model']}: tokens per second")
    yield f"![tokens per second]({file.name})"
    yield from _not_run(data["not_run"])


def _targets(verdicts: Sequence[Row]) -> Iterable[str]:
    aims = [v for v in verdicts if v["target"] != "never slower"]
    tokens = sorted({v["tokens"] for v in aims})
    lines: dict[tuple, dict[int, str]] = {}
    for v in aims:
        form = MEASURES[v["measure"]]
        value = "?" if v["value"] is None else f"{v['value']:.2g}" if form.at_most else f"{v['value']:.2f}"
        sign = "<=" if form.at_most else ">="
        text = f"{value} ({sign} {v['limit']:g})"
        key = (v["target"], v["scheme"], short_type(v["dtype"]), v["measure"])
        lines.setdefault(key, {})[v["tokens"]] = text if v["verdict"] == "reached" else f"**{text}**"
    if aims:
        yield "Targets: measured (to reach). Bold: missed, or with a question mark not measured."
        titles = ["target", "layer", "type", "measure", *(f"M={m}" for m in tokens)]
        yield _markdown(titles, [[*key, *(cells.get(m, "") for m in tokens)] for key, cells in lines.items()], left=4)
    floors = [v for v in verdicts if v["target"] == "never slower"]
    if floors:
        slow = [v for v in floors if v["verdict"] != "reached"]
        text = f"Never slower than {floors[0]['limit']:g} times F.linear: {len(floors) - len(slow)} of {len(floors)}."
        worst = sorted(slow, key=lambda v: v["value"])[:5]
        names = [f"{v['scheme']} {short_type(v['dtype'])} M={v['tokens']} {v['value']:.2f}x" for v in worst]
        yield text + (f" Slowest: {', '.join(names)}." if names else "")


def _gains(rows: Sequence[Row]) -> str:
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[str, dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(name_of(row), {})[row["tokens"]] = row
    cells = []
    for name, line in lines.items():
        some = next(iter(line.values()))
        peaks = [row["peak_bytes"] for row in line.values() if row["peak_bytes"] is not None]
        gains = [_gain(line[m]) if m in line else "-" for m in tokens]
        sizes = [_mib(some["held_bytes"]), _mib(some["resident_bytes"]), _mib(max(peaks, default=None))]
        worst = max(row["error_weights"] for row in line.values())
        cells.append([name, *gains, f"{worst:.4f}", *sizes])
    titles = ["layer", *(f"M={m}" for m in tokens), "error", "held MiB", "resident MiB", "peak MiB"]
    return _markdown(titles, cells, left=1)


def _gain(row: Row) -> str:
    if "ratio" in row:
        return f"{row['ratio']:.2f}"
    return "**wrong**" if "reason" not in row else "-"


def _not_run(items: Sequence[Row]) -> Iterable[str]:
    if items:
        reasons: dict[tuple, list[str]] = {}
        for item in items:
            key = (f"{item['library']} {item['scheme']}", tuple(item["tokens"]), item["reason"])
            reasons.setdefault(key, []).append(item["dtype"])
        yield "Not run:"
        yield "\n".join(
            f"- {name}, {', '.join(dict.fromkeys(dtypes))}"
            + (f", {', '.join(map(str, tokens))} tokens" if tokens else "")
            + f": {reason}"
            for (name, tokens, reason), dtypes in reasons.items()
        )


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _markdown(titles: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    rule = [*["---"] * left, *["---:"] * (len(titles) - left)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *lines))


if __name__ == "__main__":
    sys.exit(main())
