"""What every recipe loses, beside other libraries, on four models: a table with targets and verdicts.

    python -m qgraft.benchmarks.accuracy                                    # every shipped recipe
    python -m qgraft.benchmarks.accuracy --only "w4a8_svd,w4a4_svd rank=64" --models minilm
    python -m qgraft.benchmarks.accuracy --ablations --peers --json benchmarks/results/accuracy.json

With --json the rows of earlier runs stay, except those that were measured again, and the table shows them all: other
libraries need to run once. What is measured does not depend on how busy the machine is; the seconds do. From Python:

    model, calibration = load("minilm")
    score("minilm", Quantizer(model).quantize(recipe, calibration=calibration))
"""

import argparse
import contextlib
import gc
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from qgraft.recipes import RecipeError

from . import accuracy_table, entrants, machine, models, yardsticks
from .accuracy_table import Row
from .candidates import in_words
from .entrants import Batches, Entrant
from .peers import unchanged_settings
from .yardsticks import SAMPLES, Scores

FORMAT = 1
PATIENCE = 3600  # seconds for one entrant on one model


def load(name: str, samples: int = SAMPLES) -> tuple[nn.Module, Batches]:
    """One of the models ("smollm2", "minilm", "dit", "vit") in float32, and its calibration data."""
    yardstick = yardsticks.yardsticks()[name]
    return yardstick.load(), yardstick.calibration(samples)


def score(name: str, model: nn.Module) -> Scores:
    """What `model`, made from the one that `load(name)` gives, loses against it: metric -> number."""
    return yardsticks.yardsticks()[name].score(model)


def measure(name: str, entrant: Entrant, samples: int = SAMPLES) -> Row:
    """One entrant on one model, as plain data. Raises whatever it raises."""
    model, calibration = load(name, samples)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that stay as they are, which the bytes tell
        made = entrant.make(model, calibration if entrant.calibrated else [])
    seconds = time.perf_counter() - start
    del model
    with torch.no_grad():
        scores = {metric: _finite(value) for metric, value in score(name, made.model).items()}
    return {
        "model": name,
        "library": entrant.library,
        "name": entrant.name,
        "bits": made.bits,
        "model_bytes": made.model_bytes,
        "samples": samples if entrant.calibrated else 0,
        "seconds": seconds,
        "scores": scores,
    }


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    try:
        models.require()
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    results = _read(args.json)
    run = {"command": machine.command("accuracy", argv), "machine": machine.describe()}
    results["runs"].append(run)
    failed = False
    for name in args.models:
        for entrant in args.entrants:
            row = _attempt(name, entrant, args.samples, console)
            row["run"] = len(results["runs"]) - 1
            failed |= "reason" in row and entrant.library == "qgraft"
            _replace(results, row)
            _write(args.json, results)
    for table in accuracy_table.tables(results["rows"], args.models):
        console.print(table)
    for row in results["not_run"]:
        if row["model"] in args.models:
            console.print(f"not run: {row['name']} on {row['model']}: {row['reason']}")
    return 1 if failed else 0


def _attempt(name: str, entrant: Entrant, samples: int, console: Console) -> Row:
    """A row of results, or one that says why there is none."""
    reason = entrant.absent()
    if reason is None:
        try:
            with unchanged_settings(), _patience():
                row = measure(name, entrant, samples)
            main = yardsticks.yardsticks()[name].main
            shown = accuracy_table.show(row["scores"][main])
            console.print(f"{name}: {entrant.name}: {main} {shown}, {row['bits']:.2f} bits, "
                          f"{row['seconds']:.0f} s", soft_wrap=True)  # fmt: skip
            return row
        except Exception as error:  # other libraries may raise anything, and that they did is a result
            reason = in_words(error)
        finally:
            gc.collect()
    console.print(f"{name}: {entrant.name}: not run: {reason}", soft_wrap=True)
    return {"model": name, "library": entrant.library, "name": entrant.name, "reason": reason}


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """TimeoutError after PATIENCE seconds, where the system has an alarm clock: some libraries have cases that
    would take days."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"takes more than {PATIENCE // 60} minutes")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _read(file: Path | None) -> dict[str, Any]:
    if file is not None and file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results.get("format") == FORMAT:
            return results
    settings = {name: y.setting for name, y in yardsticks.yardsticks().items()}
    return {"format": FORMAT, "settings": settings, "targets": accuracy_table.TARGETS, "runs": [], "rows": [],
            "not_run": []}  # fmt: skip


def _replace(results: dict[str, Any], row: Row) -> None:
    for kind in ("rows", "not_run"):
        results[kind] = [r for r in results[kind] if (r["model"], r["name"]) != (row["model"], row["name"])]
    results["not_run" if "reason" in row else "rows"].append(row)
    accuracy_table.judge(results["rows"])


def _write(file: Path | None, results: dict[str, Any]) -> None:
    """Only the runs that rows still come from."""
    if file is None:
        return
    kept = sorted({r["run"] for kind in ("rows", "not_run") for r in results[kind]})
    renumbered = {kind: [{**r, "run": kept.index(r["run"])} for r in results[kind]] for kind in ("rows", "not_run")}
    text = json.dumps({**results, "runs": [results["runs"][i] for i in kept], **renumbered}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.accuracy", description=__doc__.split("\n")[0])
    known = list(yardsticks.yardsticks())
    parser.add_argument("--only", metavar="A,B", help="of ours: recipes, or 'recipe option=value ...'; none: no recipe")
    parser.add_argument("--ablations", action="store_true", help="also each ingredient taken away or changed")
    parser.add_argument("--peers", nargs="?", const="all", metavar="A,B", help="other libraries, or those named")
    parser.add_argument("--models", default=",".join(known), help=f"of {','.join(known)}; default all")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="sequences or images of calibration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to those there")
    args = parser.parse_args(argv)
    args.models = args.models.split(",")
    for name in args.models:
        if name not in known:
            parser.error(f"--models: '{name}' is none of {', '.join(known)}")
    only = None if args.only is None else [text.strip() for text in args.only.split(",") if text.strip() != "none"]
    try:
        args.entrants = entrants.ours(only, args.ablations)
        if args.peers:
            args.entrants += entrants.theirs(None if args.peers == "all" else args.peers.split(","))
    except (RecipeError, ValueError) as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
