"""The figures as files. Drawn by Vega inside vl-convert, so they are those of the page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import QGraftError
from . import figures, rows
from .data import ROOT, Row, Shown, top, tree

Spec = dict[str, Any]
SUFFIXES = (".svg", ".png", ".pdf")
PIXELS = 2.0  # a PNG's pixels for each of the page's


class FigureError(QGraftError, ValueError):
    """A report has not what a figure is made of."""


def converter() -> Any:
    """The module vl_convert; ImportError says how to get it."""
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(f"reports in HTML and figures need the extra 'report' ({error}): "
                          "pip install 'qgraft[report]'") from error  # fmt: skip
    return vl_convert


def draw(kind: str, reports: list[Shown], layer: str | None, path: str | Path) -> None:
    """Write one figure as SVG, PNG or PDF, as the name of the file says.

    kind: a key of KINDS. layer: for those that show one layer. Raises FigureError if there is nothing to draw.
    """
    check_name(path)
    path = Path(path)
    spec = KINDS[kind](reports, layer)
    vlc = converter()
    about = layer if kind in OF_ONE_LAYER else ", ".join(shown.name for shown in reports[: MANY.get(kind, 1)])
    title = {"text": about or ROOT, "subtitle": spec["description"], "anchor": "start", "subtitlePadding": 4}
    spec = {**spec, "title": title, "background": "white", "padding": 8}
    to = getattr(vlc, f"{'vega' if kind == 'tree' else 'vegalite'}_to_{path.suffix.lower()[1:]}")
    drawn = to(spec, scale=PIXELS) if path.suffix.lower() == ".png" else to(spec)
    path.write_bytes(drawn.encode() if isinstance(drawn, str) else drawn)


def check_name(path: str | Path) -> None:
    """Raise FigureError for a file of a kind that cannot be drawn."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise FigureError(f"{path}: give a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def _layers(measure: str, words: str) -> Callable:
    def figure(reports: list[Shown], layer: str | None) -> Spec:
        shown = reports[0]
        return _filled(figures.layers(measure), rows.layers(shown, measure), f"{shown.name}: no layer has {words}")

    return figure


def _tree(reports: list[Shown], layer: str | None) -> Spec:
    shown = reports[0]
    nodes = tree(shown.modules)
    return _filled(figures.tree(shown.schemes, top(nodes)), nodes, f"{shown.name}: holds nothing")


def _histogram(which: str, what: str) -> Callable:
    def figure(reports: list[Shown], layer: str | None) -> Spec:
        row = _one(reports[0], layer)
        found = _details(reports[0], row).get(which)
        nothing = f"layer '{row['name'] or ROOT}': no activations were recorded; quantize with calibration data"
        return _filled(figures.histogram(what), found and rows.histogram(found), nothing)

    return figure


def _spectrum(reports: list[Shown], layer: str | None) -> Spec:
    row = _one(reports[0], layer)
    found = _details(reports[0], row).get("spectrum")
    nothing = f"layer '{row['name'] or ROOT}' is no linear layer"
    return _filled(figures.spectrum(), found and rows.spectrum(found), nothing)


def _tradeoff(reports: list[Shown], layer: str | None) -> Spec:
    return _filled(
        figures.tradeoff(rows.tradeoff_measure(reports)), rows.tradeoff(reports), "the reports have no layers"
    )


def _compare(reports: list[Shown], layer: str | None) -> Spec:
    if len(reports) != 2:
        raise FigureError(f"a comparison takes two reports, got {len(reports)}")
    measure, found = rows.compare(*reports)
    return _filled(figures.compare(measure), found, f"{reports[0].name} and {reports[1].name} have no layer in common")


KINDS: dict[str, Callable[[list[Shown], str | None], Spec]] = {
    "error": _layers("weight_error", "a weight error"),
    "sqnr": _layers("output_sqnr", "an output SQNR, which takes calibration data to measure"),
    "tree": _tree,
    "weights": _histogram("weight", "weights"),
    "activations": _histogram("input", "activations"),
    "spectrum": _spectrum,
    "tradeoff": _tradeoff,
    "compare": _compare,
}
MANY = {"tradeoff": None, "compare": 2}  # how many reports they show, None: all
OF_ONE_LAYER = ("weights", "activations", "spectrum")


def _one(shown: Shown, layer: str | None) -> Row:
    if layer is None:
        raise FigureError(f"say which layer: --layer NAME, one of {', '.join(shown.names[:5])}, ...")
    return shown.row(layer)


def _details(shown: Shown, row: Row) -> Row:
    found = row.get("details")
    if not found:
        raise FigureError(
            f"{shown.name}: no histograms were recorded. Give the float model (--against MODEL_DIR), or quantize "
            "with details=True (on the command line: --report)"
        )
    return found


def _filled(spec: Spec, found: list[Row] | None, nothing: str) -> Spec:
    if not found:
        raise FigureError(f"there is nothing to draw: {nothing}")
    return figures.with_rows(spec, found)
