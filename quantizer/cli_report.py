"""`qgraft report`: what became of each layer, on the terminal or as a page; `qgraft plot`: its figures as files."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from .cli_output import UsageError, say, show
from .html import data, drawing, page
from .html.against import read_details
from .report import Report


def report(folders: list[Path], html: Path | None, against: Path | None = None, every: bool = False) -> None:
    """The page needs its libraries: they are asked for before anything is read."""
    if html is not None:
        drawing.converter()
    reports = _read(folders, against)
    if html is None:
        for shown in reports:
            _print(shown, every)
        if len(reports) > 1:
            show(_beside(reports))
        return
    page.write(reports, html)
    say(f"wrote {html}")


def plot(folders: list[Path], kind: str, output: Path, layer: str | None, against: Path | None) -> None:
    drawing.check_name(output)
    drawing.converter()
    if layer is not None and kind not in drawing.OF_ONE_LAYER:
        raise UsageError(
            f"--kind {kind} shows all layers; --layer is for {', '.join(drawing.OF_ONE_LAYER)}", param_hint="'--layer'"
        )
    drawing.draw(kind, _read(folders, against), layer, output)
    say(f"wrote {output}")


def _read(folders: list[Path], against: Path | None) -> list[data.Shown]:
    reports = [data.read(folder) for folder in folders]
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
