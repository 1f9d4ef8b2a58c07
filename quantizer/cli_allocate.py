"""`qgraft allocate`."""

import sys
from pathlib import Path

import torch

from ..recipes import load_recipe
from . import cli_text
from .allocate import allocate
from .budget import parse
from .cli_output import say, show
from .cli_quantize import calibration_batches
from .errors import QGraftError
from .interop.huggingface import ModelFolder, quiet


def run(
    model_dir: Path,
    budget: str,
    candidates: list[str],
    ranks: list[int],
    group: str,
    calibration: str,
    samples: int,
    out: Path,
    as_json: Path | None,
    device: torch.device | None,
) -> None:
    """Whatever can be refused is refused before the weights are read."""
    parse(budget)
    recipes = [load_recipe(candidate) for candidate in candidates]
    for path, suffixes in ((out, (".yaml", ".yml")), (as_json, (".json",))):
        if path is not None and (path.suffix not in suffixes or not path.resolve().parent.is_dir()):
            raise QGraftError(f"{path}: give a name that ends in {suffixes[0]}, in a folder that exists")
    text = cli_text.read_text(calibration)
    source = ModelFolder(model_dir)
    with quiet(bars=sys.stderr.isatty()):
        source.check_float()
        spec = recipes[0].calibration.model_copy(update={"samples": samples})
        data = calibration_batches(source, source.tokenizer(), text, spec)
        say(f"loading {source}")
        model = source.load(None)
    if device is not None:
        model = model.to(device)
    say(f"measuring with {len(data)} sequences of text")
    found = allocate(model, budget, recipes, calibration=data, ranks=ranks, group=group)
    show(found.table())
    found.save(out)
    say(f"saved {out}; next: qgraft quantize {model_dir} --recipe {out} --calibration {calibration} --out DIR")
    if as_json is not None:
        found.save(as_json)
