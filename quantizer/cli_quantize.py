"""`qgraft plan` and `qgraft quantize`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor, nn

from ..recipes import CalibrationSpec, Recipe, load_recipe
from . import cli_report, cli_text
from .checkpoint import check_target, save
from .cli_options import Debug, Device, Dtype, Every, Json, ModelDir, RecipeName
from .cli_output import UsageError, say, show, show_json
from .distributed import Ranks, peak_memory
from .errors import CalibrationError, PlanError
from .float_files import CannotStream, float_dtype
from .html.drawing import converter
from .interop.huggingface import ModelFolder, quiet
from .interop.huggingface_names import names_of_files
from .partial import Partial
from .plan import Plan
from .quantizer import Quantizer
from .report import Report
from .streaming import quantize_files
from .tables import count, size


def plan(
    model_dir: ModelDir, recipe: RecipeName, every: Every = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Show what a recipe would do to each layer.

    Reads no weights, so that even the largest model takes seconds.

    \b
    Example: qgraft plan ./model -r my_recipe.yaml --every
    """
    spec = load_recipe(recipe)
    planned = Quantizer(_skeleton(ModelFolder(model_dir), None)).plan(spec)
    if as_json:
        show_json(planned.to_dict())
    else:
        show(planned.table(every))


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
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page of what became of each layer; takes longer.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it, with its tokenizer.

    Shows the plan, quantizes, and shows the error of each layer. All that can be refused is refused before
    the weights are read. The calibration text is cut into sequences, as many and as long as the recipe says.
    Safetensors are read and quantized layer by layer, or block by block with calibration text: the model may
    be larger than memory, and a run that was killed goes on where it stopped. Without such text torchrun may
    start several processes.

    \b
    Example: qgraft quantize ./model -r w4a4_svd --calibration t.txt --out ./out
    """
    if out is None and not dry_run:
        raise UsageError("say where to save the model, or give --dry-run", param_hint="'--out'")
    if report is not None and dry_run:
        raise UsageError("a dry run quantizes nothing that could be reported", param_hint="'--report'")
    _quantize(model_dir, recipe, out, calibration, dry_run, dtype.torch, device, stream, report)


def _quantize(
    model_dir: Path,
    recipe: str,
    out: Path | None,
    calibration: str | None,
    dry_run: bool,
    dtype: torch.dtype | None,
    device: torch.device | None,
    stream: bool | None,
    report: Path | None,
) -> None:
    """Whatever can be refused is refused before the weights are read, which may take long.

    stream: whether to go from file to file without building the model; None: if that is possible.
    report: the HTML page to write; what it needs is asked for first, too.
    """
    if report is not None:
        converter()
    spec = load_recipe(recipe)
    if out is not None:
        check_target(out)
    text = None if calibration is None else cli_text.read_text(calibration)
    source = ModelFolder(model_dir)
    skeleton = _skeleton(source, dtype)
    planned = Quantizer(skeleton).plan(spec)
    ranks = Ranks()
    if ranks.is_first:
        show(planned.table())
    _check(planned, calibrated=text is not None)
    if dry_run or out is None:
        return
    tokenizer = data = None
    if text is not None:
        with quiet(bars=False):
            tokenizer = source.tokenizer()
            data = calibration_batches(source, tokenizer, text, spec.calibration)
    try:
        why_not = "" if stream is not False else "--no-stream"
        if not why_not:
            _stream(source, skeleton, spec, out, data, dtype, device, ranks, details=report is not None)
            if report is not None and ranks.is_first:
                cli_report.report([out], report)
            return
    except CannotStream as error:
        why_not = str(error)
    if stream or ranks.world > 1:
        raise CannotStream(f"the layers cannot be streamed from file to file: {why_not}")
    say(f"loading {source} as a whole: {why_not}")
    with quiet(bars=sys.stderr.isatty()):
        tokenizer = tokenizer or source.tokenizer()
        model = source.load(dtype)
    if device is not None:
        model = model.to(device)
    quantizer = Quantizer(model)
    with_data = f" with {count(len(data), 'sequence')} of text" if data else ""
    say(f"quantizing {count(len(planned.todo), 'layer')}{with_data}")
    model = quantizer.quantize(spec, calibration=data, details=report is not None)
    _show(quantizer.report)
    with source.files_to_carry(model, tokenizer) as files:
        save(model, out, extra_files=files)
    say(f"saved {out}")
    if report is not None:
        cli_report.report([out], report)


def _stream(
    source: ModelFolder,
    skeleton: nn.Module,
    recipe: Recipe,
    out: Path,
    data: list[dict[str, Tensor]] | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    ranks: Ranks,
    details: bool,
) -> None:
    if source.gguf:
        raise CannotStream(f"{source} is no folder of safetensors")
    if (dtype or getattr(source.config, "dtype", None) or float_dtype(source.path)) is None:
        raise CannotStream(f"{source} has weights of several types, and its config names none: give --dtype")
    tell = say if ranks.is_first else lambda message: None
    how = "layer by layer" if data is None else f"block by block, with {count(len(data), 'sequence')} of text"
    tell(f"streaming {source}: {how}, the model is never built")
    with quiet(bars=False), source.files_to_carry(skeleton) as files, _told_to_go_on(out, tell):
        report = quantize_files(
            source.path,
            recipe,
            out,
            model=skeleton,
            calibration=data,
            naming=names_of_files,
            device=device,
            extra_files=files,
            details=details,
            say=tell,
        )
    if ranks.is_first:
        _show(report)
        if peak := peak_memory():
            say(f"peak memory {size(peak)}")
        say(f"saved {out}")


@contextmanager
def _told_to_go_on(out: Path, tell: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if Partial(out).root.exists():
            tell("what was done is kept: the same command goes on from there")
        raise


def _show(report: Report) -> None:
    show(report.table(), *map(Text, report.notes()))


def _skeleton(source: ModelFolder, dtype: torch.dtype | None) -> nn.Module:
    with quiet(bars=False):
        source.check_float()
        if dtype is None and not source.gguf and getattr(source.config, "dtype", None) is None:
            dtype = float_dtype(source.path)  # as loading the weights would find out
        return source.skeleton(dtype)


def _check(planned: Plan, calibrated: bool) -> None:
    if not planned.todo:
        raise PlanError(f"recipe {planned.recipe.name} quantizes no layer of this model")
    for layer in planned.todo:
        complaint = layer.scheme.needs_data()
        if complaint and not calibrated:
            raise CalibrationError(f"layer '{layer.label}': {complaint} (--calibration FILE gives some)")


def calibration_batches(
    source: ModelFolder, tokenizer: Any, text: str, spec: CalibrationSpec
) -> list[dict[str, Tensor]]:
    """The text as batches of one sequence each."""
    if tokenizer is None:
        raise CalibrationError(f"{source}: has no tokenizer, without which text cannot calibrate it")
    tokens = cli_text.longest(tokenizer, source.config, spec.tokens)
    batches = []
    for ids in cli_text.sequences(tokenizer, text, tokens, spec.samples):
        batch = {"input_ids": ids}
        if source.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        batches.append(batch)
    return batches
