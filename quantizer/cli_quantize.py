"""`qgraft plan` and `qgraft quantize`."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipes import CalibrationSpec, Recipe, load_recipe
from . import cli_text
from .checkpoint import check_target, save
from .cli_output import say, show, show_json
from .errors import CalibrationError, PlanError
from .interop.huggingface import ModelFolder, quiet
from .plan import Plan
from .quantizer import Quantizer


def plan(model_dir: Path, recipe: str, every: bool, as_json: bool) -> None:
    spec = load_recipe(recipe)
    planned = _plan(ModelFolder(model_dir), spec, None)
    if as_json:
        show_json(planned.to_dict())
    else:
        show(planned.table(every))


def quantize(
    model_dir: Path,
    recipe: str,
    out: Path | None,
    calibration: str | None,
    dry_run: bool,
    dtype: torch.dtype | None,
    device: str | None,
) -> None:
    """Whatever can be refused is refused before the weights are read, which may take long."""
    spec = load_recipe(recipe)
    if out is not None:
        check_target(out)
    text = None if calibration is None else cli_text.read_text(calibration)
    source = ModelFolder(model_dir)
    planned = _plan(source, spec, dtype)
    show(planned.table())
    _check(planned, calibrated=text is not None)
    if dry_run or out is None:
        return
    with quiet(bars=sys.stderr.isatty()):
        tokenizer = source.tokenizer()
        data = None if text is None else calibration_batches(source, tokenizer, text, spec.calibration)
        say(f"loading {source}")
        model = source.load(dtype)
    if device is not None:
        model = model.to(device)
    quantizer = Quantizer(model)
    say(f"quantizing {len(planned.todo)} layers" + (f" with {len(data)} sequences of text" if data else ""))
    model = quantizer.quantize(spec, calibration=data)
    show(quantizer.report.table())
    with source.files_to_carry(model, tokenizer) as files:
        save(model, out, extra_files=files)
    say(f"saved {out}")


def _plan(source: ModelFolder, recipe: Recipe, dtype: torch.dtype | None) -> Plan:
    with quiet(bars=False):
        source.check_float()
        return Quantizer(source.skeleton(dtype)).plan(recipe)


def _check(planned: Plan, calibrated: bool) -> None:
    if not planned.todo:
        raise PlanError(f"recipe {planned.recipe.name} quantizes no layer of this model")
    for layer in planned.todo:
        complaint = layer.scheme.needs_data()
        if complaint and not calibrated:
            raise CalibrationError(f"layer '{layer.label}': {complaint}; give --calibration")


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
