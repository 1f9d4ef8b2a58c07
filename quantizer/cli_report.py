"""`qgraft report`: what became of each layer, on the terminal or as a page; `qgraft plot`: its figures as files."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .cli_options import Debug, Every
from .cli_output import UsageError, say, show
from .html import data, drawing, page
from .html.against import read_details
from .report import Report


class Kind(str, Enum):
    """Figures of a report; those that `html.drawing` knows."""

    error = "error"
    sqnr = "sqnr"
    weights = "weights"
    activations = "activations"
    spectrum = "spectrum"
    tree = "tree"
    tradeoff = "tradeoff"
    compare = "compare"


Folders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR", help="Quantized models, or report.json files.", show_default=False),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="MODEL_DIR", help="The float model, to compare weights with."),
]


def report(
    folders: Folders,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page instead.")] = None,
    against: Against = None,
    every: Every = False,
    debug: Debug = False,
) -> None:
    """Show what became of each layer, and what to do.

    Several models are compared. The page has histograms of weights and activations if the model was
    quantized with --report; --against finds those of the weights later.

    \b
    Example: qgraft report ./w4a4 ./w4a8 --html report.html
    """
    if html is not None:
        drawing.converter()  # a library that is missing is missed before anything is read
    reports = _read(folders, against)
    if html is None:
        for shown in reports:
            _print(shown, every)
        if len(reports) > 1:
            show(_beside(reports))
        return
    page.write(reports, html)
    say(f"wrote {html}")


def plot(
    folders: Folders,
    kind: Annotated[Kind, typer.Option(help="What to draw.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="An .svg, .png or .pdf file.", show_default=False)
    ],
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="For weights, activations and spectrum: of which layer.")
    ] = None,
    against: Against = None,
    debug: Debug = False,
) -> None:
    """Draw a figure of the report into a file.

    \b
    Example: qgraft plot ./w4a4 --kind tree -o bytes.svg
    """
    drawing.check_name(output)
    drawing.converter()
    if layer is not None and kind.value not in drawing.OF_ONE_LAYER:
        raise UsageError(
            f"--kind {kind.value} shows all layers; --layer is for {', '.join(drawing.OF_ONE_LAYER)}",
            param_hint="'--layer'",
        )
    drawing.draw(kind.value, _read(folders, against), layer, output)
    say(f"wrote {output}")


def _read(folders: list[Path], against: Path | None) -> list[data.Shown]:
    reports = [data.read(folder) for folder in folders]
    names = [shown.name for shown in reports]
    for shown, folder in zip(reports, folders, strict=True):
        if names.count(shown.name) > 1:  # a/out and b/out are told apart by their paths
            shown.name = str(folder)
    if against is not None:
        for shown, folder in zip(reports, folders, strict=True):
            if folder.is_file():
                raise UsageError(f"{folder} is a report alone; --against takes the folder of the quantized model")
            say(f"comparing the weights of {folder} with those of {against}")
            read_details(shown, folder, against)
    return reports


def _print(shown: data.Shown, every: bool) -> None:
    plain = [{key: value for key, value in row.items() if key in data.KNOWN} for row in shown.rows]
    show(Text(shown.name), Report.from_dict({"layers": plain}).table(every))
    for note in shown.notes:
        show(Text(note))
    for i in shown.flagged[: page.MOST_ADVICE]:
        for item in shown.advice[i]:
            show(Text(f"{shown.rows[i]['name'] or data.ROOT}: {item.what}. {item.do}"))
    if len(shown.flagged) > page.MOST_ADVICE:
        show(Text(f"... and {len(shown.flagged) - page.MOST_ADVICE} more layers to check; --html shows all"))


def _beside(reports: list[data.Shown]) -> Table:
    table = Table()
    table.add_column("report", overflow="fold")
    for title in ("size", "weight\nerror", "output\nSQNR", "to check"):
        table.add_column(title, justify="right", no_wrap=True)
    for shown in reports:
        numbers = page.size(shown.after), page.percent(shown.weight_error), page.decibel(shown.sqnr)
        table.add_row(Text(shown.name), *numbers, str(len(shown.flagged)))
    return table
