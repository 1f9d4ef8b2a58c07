"""`qgraft allocate`."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..recipes import load_recipe
from . import allocate as allocation
from . import cli_text
from .budget import parse
from .cli_options import Debug, Device, ModelDir
from .cli_output import say, show
from .cli_quantize import calibration_batches
from .errors import QGraftError
from .interop.huggingface import ModelFolder, quiet


class Group(str, Enum):
    """Which layers get the same."""

    fused = "fused"
    none = "none"


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
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there, too.")
    ] = None,
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
    # Whatever can be refused is refused before the weights are read.
    allocation.check_solver()
    parse(budget)
    recipes = [load_recipe(name) for name in candidate]
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
    found = allocation.allocate(model, budget, recipes, calibration=data, ranks=rank or [], group=group.value)
    show(found.table())
    found.save(out)
    say(f"saved {out}; next: qgraft quantize {model_dir} --recipe {out} --calibration {calibration} --out DIR")
    if as_json is not None:
        found.save(as_json)
