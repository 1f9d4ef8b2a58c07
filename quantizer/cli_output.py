"""What all commands share: results on stdout, messages on stderr, exit codes that scripts can rely on."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from ..recipes import RecipeError
from .errors import QGraftError
from .names import narrowed, unbroken

FAILED = 1
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13  # as a shell reports SIGINT and SIGPIPE

UsageError = typer.BadParameter  # shown with the usage of the command, exit code 2

_debug = False


def set_debug(wanted: bool) -> None:
    """Whether errors show their traceback; the environment variable QGRAFT_DEBUG=1 says so too."""
    global _debug
    _debug = wanted or os.environ.get("QGRAFT_DEBUG", "0") not in ("", "0")


def show(*parts: RenderableType) -> None:
    """Print tables or text on stdout. Where that is no terminal: plain, and 80 columns wide or what names need."""
    console = _Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    free = not console.is_terminal and "COLUMNS" not in os.environ
    for part in parts:
        wanted = unbroken(part, console) if free and isinstance(part, Table) else None
        if wanted is not None:
            console.width = wanted
        elif isinstance(part, Table):
            narrowed(part, console.width)
        console.print(part)
        console.width = None


def show_json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=str))


def say(message: str) -> None:
    """A message on stderr, where it is not mistaken for a result."""
    print(f"qgraft: {message}", file=sys.stderr, flush=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would exit here, with the code of a failure


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what can go wrong into one message and an exit code; other exceptions are bugs and stay loud."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            yield
        except BrokenPipeError:
            raise typer.Exit(BROKEN_PIPE) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (QGraftError, RecipeError, OSError, ImportError) as error:
            if _debug:
                traceback.print_exc()
            say(f"error: {_in_words(error)}")
            raise typer.Exit(FAILED) from None


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
