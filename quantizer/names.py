"""Names of modules in tables: broken after a dot where they must be, and not at all in a file or a pipe."""

import re

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

LAYER = "layer"  # the first column of a table of layers
MOST_OF_OTHERS = 44  # columns for reasons and options, which are read and not searched for
NARROW = 72  # fewer columns leave names no room beside all numbers
SPARED = ("shape", "bits", "before", "seconds")
MAY_END = re.compile(r"(?<=\.)|(?= )")


class Name:
    """A module's name as a cell of a table, which goes on in the next line after a dot if it must."""

    def __init__(self, name: str):
        self.name = name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(cell_len, MAY_END.split(self.name)))
        return Measurement(min(longest, options.max_width), min(cell_len(self.name), options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, line = options.max_width, ""
        for part in MAY_END.split(self.name):
            # A part that is too long by itself is broken after underscores, and if need be anywhere.
            for piece in [part] if cell_len(part) <= width else re.split(r"(?<=_)", part):
                if line and cell_len(line + piece) > width:
                    yield Text(line, overflow="fold")
                    piece, line = piece.lstrip(), ""
                line += piece
        yield Text(line, overflow="fold")


def narrowed(table: Table, width: int) -> None:
    """Take from a table of layers what a narrow terminal has no room for."""
    if width < NARROW and table.columns and table.columns[0].header == LAYER:
        table.columns = [column for column in table.columns if column.header not in SPARED]


def unbroken(table: Table, console: Console) -> int | None:
    """The width that leaves each name of a table of layers in one piece; None for other tables.

    For files and pipes, where lines are searched for names and may be long.
    """
    if not table.columns or table.columns[0].header != LAYER:
        return None
    names = [cell_len(cell.name) for cell in table.columns[0].cells if isinstance(cell, Name)]
    table.columns[0].min_width = max(names, default=0)
    for column in table.columns[1:]:
        if not column.no_wrap:
            column.max_width = MOST_OF_OTHERS
    return console.measure(table, options=console.options.update(width=max(names, default=0) + 1000)).maximum
