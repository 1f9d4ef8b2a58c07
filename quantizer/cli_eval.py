"""`qgraft eval`: how much of the original model is left in a quantized one."""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from ..layers import storage_bytes
from . import cli_text, tables
from . import evaluate as measure
from .cli_options import Debug, Device
from .cli_output import UsageError, say, show
from .errors import QGraftError
from .interop.huggingface import READABLE, ModelFolder, quiet


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
        raise UsageError("give a file, or text on stdin", param_hint="'--text'")
    source = ModelFolder(folder)
    reference = None if original is None else ModelFolder(original)
    causal = source.model_class.can_generate() and not source.config.is_encoder_decoder
    if not causal and reference is None:
        raise UsageError(f"{source} predicts no text: give --original, to compare its vectors with")
    text = cli_text.read_text(text)
    with quiet(bars=sys.stderr.isatty()):
        tokenizer = source.tokenizer() or (reference and reference.tokenizer())
        if tokenizer is None:
            raise QGraftError(f"{source}: has no tokenizer, and it takes one to read text")
        longest = cli_text.longest(tokenizer, source.config, window)
        if longest < window:
            say(f"warning: the model takes {longest} tokens at most, so that is the window")
        evaluation = _Evaluation(source, reference, tokenizer, text, longest, limit, device)
        show(*(evaluation.perplexities() if causal else evaluation.cosines()))


@dataclass(frozen=True)
class _Evaluation:
    """A model, the original if it is given, and what to measure them on. Only one of them is in memory."""

    source: ModelFolder
    original: ModelFolder | None
    tokenizer: Any
    text: str
    window: int
    limit: int | None
    device: torch.device | None

    def perplexities(self) -> tuple[Table, str]:
        tokens = cli_text.token_ids(self.tokenizer, self.text, self.limit)
        if len(tokens) < 2:
            raise QGraftError(f"the text has {len(tokens)} tokens, so there is nothing to predict")
        table = _table("perplexity", "ratio")
        first = None
        for folder in (self.original, self.source):
            if folder is None:
                continue
            model = self._load(folder)
            value = measure.perplexity(model, tokens, self.window, progress=True)
            ratio = f"{value / first:.4f}" if first else "1" if self.original else "-"
            first = first or value
            table.add_row(str(folder), tables.size(storage_bytes(model)), f"{value:.2f}", ratio)
            del model
        return table, f"{len(tokens)} tokens in windows of {self.window}; lower is better"

    def cosines(self) -> tuple[Table, str]:
        lines = cli_text.line_batches(self.tokenizer, self.text, self.window, self.limit)
        batches = list(lines)
        first, first_size = self._vectors(self.original, batches)
        other, other_size = self._vectors(self.source, batches)
        if first.shape != other.shape:
            raise QGraftError(
                f"{self.source} gives vectors of {other.shape[1]} numbers, {self.original} of "
                f"{first.shape[1]}: it was not made from that"
            )
        table = _table("mean cosine")
        table.add_row(str(self.original), first_size, "1")
        table.add_row(str(self.source), other_size, f"{measure.cosine_to(first, other):.6f}")
        return table, f"vectors of {len(first)} lines of text; 1 is the same direction"

    def _vectors(self, folder: ModelFolder, batches: list[dict[str, Tensor]]) -> tuple[Tensor, str]:
        model = self._load(folder)
        # The hidden states, not what a head makes of them; of an encoder and a decoder, the encoder's.
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        batches = [_taken(encoder, batch) for batch in batches]
        return measure.embed(encoder, batches, progress=True), tables.size(storage_bytes(model))

    def _load(self, folder: ModelFolder) -> nn.Module:
        say(f"loading {folder}")
        if folder.quant_method in READABLE:
            return folder.load_quantized(self.device)
        model = folder.load()
        return model if self.device is None else model.to(self.device)


def _taken(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what a tokenizer gives, what the model takes: some give token_type_ids for models that know no types."""
    known = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return batch
    return {name: tensor for name, tensor in batch.items() if name in known}


def _table(*numbers: str) -> Table:
    table = Table()
    table.add_column("model", overflow="fold")
    for number in ("size", *numbers):
        table.add_column(number, justify="right", no_wrap=True)
    return table
