"""The command line: `qgraft`, or `python -m qgraft.quantizer.cli`.

Results go to stdout, messages and progress to stderr. Exit codes: 0 ok, 1 the work failed, 2 wrong usage,
130 interrupted, 141 the reader of stdout went away. What a command imports is imported when it runs.
"""

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cli_output import BROKEN_PIPE, FAILED, INTERRUPTED, exit_codes, say, set_debug

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


class Dtype(str, Enum):
    """Types that a float model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Group(str, Enum):
    """Which layers `allocate` gives the same."""

    fused = "fused"
    none = "none"


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


def _debug(wanted: bool) -> bool:
    if wanted:
        set_debug(True)
    return wanted


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"qgraft {__version__}")
        raise typer.Exit


ModelDir = Annotated[
    Path,
    typer.Argument(metavar="MODEL_DIR", help="Folder of a Hugging Face model, or a .gguf file.", show_default=False),
]
RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", metavar="R", help="Shipped recipe (see `qgraft recipes`) or a YAML file."),
]
Folders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR", help="Quantized models, or report.json files.", show_default=False),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="MODEL_DIR", help="The float model, to compare weights with."),
]
Every = Annotated[bool, typer.Option("--every", help="One line a layer, even where they are alike.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="Where to compute, such as cuda.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug)]


@app.callback()
def qgraft(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    set_debug(debug)


@app.command()
@exit_codes()
def quantize(
    model_dir: ModelDir,
    recipe: RecipeName,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write: a new one, or an older result.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text like what the model will see, UTF-8; - for stdin."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and stop there.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Load the model in this type; auto: its own.")] = Dtype.auto,
    device: Device = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Layer by layer, from file to file; by default where possible."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page of what became of each layer, too.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it, with its tokenizer.

    Shows the plan, quantizes, and shows the error of each layer. All that can be refused is refused before
    the weights are read. The calibration text is cut into sequences, as many and as long as the recipe says.
    Without it, safetensors are quantized layer by layer: the model may be larger than memory, torchrun
    may start several processes, and a run that was killed goes on where it stopped.

    \b
    Example: qgraft quantize ./model -r w4a4_svd --calibration t.txt --out ./out
    """
    if out is None and not dry_run:
        raise typer.BadParameter("say where to save the model, or give --dry-run", param_hint="'--out'")
    if report is not None and dry_run:
        raise typer.BadParameter("a dry run quantizes nothing that could be reported", param_hint="'--report'")
    where = _device(device)
    from . import cli_quantize

    cli_quantize.quantize(model_dir, recipe, out, calibration, dry_run, _torch_dtype(dtype), where, stream, report)


@app.command()
@exit_codes()
def plan(
    model_dir: ModelDir, recipe: RecipeName, every: Every = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Show what a recipe would do to each layer.

    Reads no weights, so that even the largest model takes seconds.

    \b
    Example: qgraft plan ./model -r my_recipe.yaml --every
    """
    from . import cli_quantize

    cli_quantize.plan(model_dir, recipe, every, as_json)


@app.command()
@exit_codes()
def allocate(
    model_dir: ModelDir,
    budget: Annotated[
        str,
        typer.Option(metavar="B", help="'4.6 bits' of a weight, or '2.1 GiB' of the whole model.", show_default=False),
    ],
    candidate: Annotated[
        list[str],
        typer.Option("--candidate", "-c", metavar="R", help="A recipe to choose from; several.", show_default=False),
    ],
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE", help="Text like what the model will see; - for stdin.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe to write, .yaml.", show_default=False)],
    rank: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Try candidates with a branch of this rank, too; several.")
    ] = None,
    group: Annotated[Group, typer.Option(help="fused: the same for q, k and v, and for gate and up.")] = Group.fused,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences of text to measure with.")] = 16,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all numbers there, too.")] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Choose each layer's recipe under a budget of bits or bytes.

    Measures once what each candidate does to each layer, then solves for the least error within the
    budget. Writes an ordinary recipe, and shows what other budgets would buy.

    \b
    Example: qgraft allocate ./model --budget '4.6 bits' -c w4a16 -c w8a16
                 --calibration t.txt --out mine.yaml
    """
    where = _device(device)
    from . import cli_allocate

    cli_allocate.run(model_dir, budget, candidate, rank or [], group.value, calibration, samples, out, json, where)


@app.command()
@exit_codes()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """List the recipes that ship with qgraft, or print one.

    What is printed is a recipe again, to start one of your own from.

    \b
    Example: qgraft recipes w4a4_svd > my_recipe.yaml
    """
    from . import cli_recipes

    if name is None:
        cli_recipes.list_recipes()
    else:
        cli_recipes.print_recipe(name)


@app.command()
@exit_codes()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized model.", show_default=False)],
    every: Every = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a quantized model, and check it.

    Compares the checksums of its files and reads their headers, but loads no weights.

    \b
    Example: qgraft inspect ./w4a4 --json
    """
    from . import cli_inspect

    cli_inspect.inspect(folder, every, as_json)


@app.command()
@exit_codes()
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
    from . import cli_report

    cli_report.report(folders, html, against, every)


@app.command()
@exit_codes()
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
    from . import cli_report

    cli_report.plot(folders, kind.value, output, layer, against)


@app.command()
@exit_codes()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized model.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, a new one.", show_default=False)],
    format: Annotated[str, typer.Option(metavar="F", help="Format of others.")] = "compressed-tensors",
    debug: Debug = False,
) -> None:
    """Write a quantized model in a format of others.

    compressed-tensors is what transformers and vLLM load, without qgraft. Recipe w4a16_ct makes 4-bit
    layers that it can hold; so do w8a16 and w8a8.

    \b
    Example: qgraft export ./w4a16_ct --out ./for_vllm
    """
    from . import cli_export

    cli_export.run(folder, out, format)


@app.command("eval")
@exit_codes()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model, quantized or not.", show_default=False)],
    text: Annotated[str, typer.Option(metavar="FILE", help="Text to measure on, UTF-8; - for stdin.")] = "-",
    original: Annotated[Path | None, typer.Option(metavar="MODEL_DIR", help="The model that it was made from.")] = None,
    window: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens that the model sees at once.")] = 512,
    limit: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Use the first N tokens of the text only.")
    ] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Measure how good a model is on a text.

    A causal language model: its perplexity, and if --original is given, that of the original and the ratio
    of the two. Any other: the mean cosine of its vectors to those of --original, over the lines of the text.

    \b
    Example: qgraft eval ./w4a4 --original ./model --text news.txt --limit 8192
    """
    if text == "-" and sys.stdin.isatty():
        raise typer.BadParameter("give a file, or text on stdin", param_hint="'--text'")
    where = _device(device)
    from . import cli_eval

    cli_eval.run(folder, text, original, window, limit, where)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@exit_codes()
def bench(context: typer.Context) -> None:
    """Time every layer against F.linear on this machine.

    \b
    Example: qgraft bench --scheme w8a16 --shape 4096x4096 --tokens 1,16
    """
    from ..benchmarks import run

    raise typer.Exit(run.main(context.args))


@app.command()
@exit_codes()
def warmup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized model.", show_default=False)],
    tokens: Annotated[
        str, typer.Option(metavar="M,..", help="Numbers of tokens that a layer will see at once.")
    ] = "1,16,64,512,2048",
    tune: Annotated[bool, typer.Option("--tune", help="Try other tiles too, and keep what is faster.")] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Compile the GPU kernels that a quantized model needs.

    Runs one layer of each kind, empty: nobody has to wait for a compiler later. Reads no weights.

    \b
    Example: qgraft warmup ./w4a16 --tokens 1,512 --tune
    """
    where = _device(device)
    counts = tuple(int(count) if count.strip().isdecimal() else 0 for count in tokens.split(","))
    if min(counts) < 1:
        raise typer.BadParameter(f"{tokens}: give numbers such as 1,512", param_hint="'--tokens'")
    from . import cli_warmup

    cli_warmup.run(folder, counts, tune, where)


def _device(text: str | None):
    if text is None:
        return None
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{text}: {reason}", param_hint="'--device'") from None
    return device


def _torch_dtype(dtype: Dtype):
    import torch

    return None if dtype is Dtype.auto else getattr(torch, dtype.value)


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
