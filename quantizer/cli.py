"""The command line: `qgraft`, or `python -m qgraft.quantizer.cli`. Each command is a file `cli_*.py`.

Results go to stdout, messages and progress to stderr. Exit codes: 0 ok, 1 the work failed, 2 wrong usage,
130 interrupted, 141 the reader of stdout went away.
"""

import os
import sys
from typing import Annotated

import typer

from .cli_allocate import allocate
from .cli_bench import bench
from .cli_eval import evaluate
from .cli_export import export
from .cli_inspect import inspect
from .cli_output import BROKEN_PIPE, FAILED, INTERRUPTED, exit_codes, say, set_debug
from .cli_quantize import plan, quantize
from .cli_recipes import recipes
from .cli_report import plot, report
from .cli_warmup import warmup

app = typer.Typer(
    name="qgraft",
    help="Quantize the linear layers of a PyTorch model, as a recipe says.",
    epilog="Example: qgraft quantize ./model --recipe w8a16 --out ./w8a16",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (quantize, plan, allocate, recipes, inspect, report, plot, export):
    app.command()(exit_codes()(command))
app.command("eval")(exit_codes()(evaluate))
# Its own parser knows its options.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    exit_codes()(bench)
)
app.command()(exit_codes()(warmup))


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"qgraft {__version__}")
        raise typer.Exit


@app.callback()
def qgraft(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    set_debug(debug)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        app(args=argv, prog_name="qgraft")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # Python flushes again at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        say(f"error: standard output: {error.strerror}")
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
