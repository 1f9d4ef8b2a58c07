"""Quantize a real language model and a real sentence encoder with every shipped recipe, and show the result.

    python -m qgraft.benchmarks.demo [--out demo_out] [--quick]

For each model and recipe: size, time to quantize, quality against the float model, speed against the float
model of the same type, a sample, and whether a saved copy loads back to the same bits. Writes the checkpoints
with their reports, results.json and results.md. The claims of `claims.py` are checked at the end; exit code 1
if one fails, 2 if a package is missing. What is printed on stderr is progress only.
"""

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import qgraft
from qgraft.layers import storage_bytes

from . import claims, machine, models, render
from .subjects import LanguageModel, SentenceEncoder, Subject
from .timing import interleaved

Say = Callable[[str], float]


@dataclass(frozen=True)
class Run:
    """A recipe, the type of the model that it is for, and whether it is given calibration data."""

    recipe: str
    dtype: torch.dtype
    calibrated: bool = False


RUNS = (
    Run("w8a32", torch.float32),
    Run("w4a8_svd", torch.float32, calibrated=True),
    Run("w4a4_svd", torch.float32, calibrated=True),
    Run("w8a16", torch.bfloat16),
)
WINDOWS = 8  # of 512 tokens that perplexity is measured on
DOCUMENTS = 32  # that the language model is calibrated with
SPEED_SECONDS = 25  # of turns for each kind of speed


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for all that is written")
    parser.add_argument("--quick", action="store_true", help="the sentence encoder only, with little data")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
    say = narrator()
    try:
        models.require()
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    results: dict[str, Any] = {
        "command": machine.command("demo", argv),
        "machine": machine.describe(),
        "models": {},
    }
    for load in _loaders(args.quick):
        subject = load(say)
        results["models"][subject.name] = result = measure(subject, args.out / subject.name, console, say)
        console.print()
        console.print(render.rich_table(subject.name, result))
        for row in result["rows"]:
            if row["sample"]:
                console.print(f"{row['name']:>14}: {row['sample']}")
        del subject
    checked = claims.check(results["models"])
    results["claims"] = [claim.to_dict() for claim in checked]
    results["seconds"] = round(say("done"), 1)
    write(results, args.out)
    console.print()
    for claim in checked:
        console.print(str(claim))
    console.print(f"\nresults, checkpoints and reports are in {args.out}")
    return 0 if all(claim.ok for claim in checked) else 1


def measure(subject: Subject, out: Path, console: Console, say: Say) -> dict[str, Any]:
    """Everything about one model, as plain data."""
    variants: dict[str, nn.Module] = {}
    rows = []
    for dtype in dict.fromkeys(run.dtype for run in RUNS):
        name = str(dtype).removeprefix("torch.")
        base = variants[name] = subject.model if dtype is torch.float32 else subject.in_dtype(dtype)
        rows.append({"name": name, "recipe": None, "dtype": name, "bytes": storage_bytes(base)})
        for run in (run for run in RUNS if run.dtype is dtype):
            say(f"{subject.name}: {run.recipe}")
            start = time.perf_counter()
            model = copy.deepcopy(base)
            model = qgraft.Quantizer(model).quantize(
                run.recipe, calibration=subject.calibration if run.calibrated else None
            )
            seconds = time.perf_counter() - start
            variants[run.recipe] = model
            report = qgraft.Report.of(model)
            console.print(f"{subject.name} {run.recipe}: {report.summary()}")
            if run.calibrated:  # then there is an error of the outputs to show as well
                console.print(report.table())
            rows.append(
                {
                    "name": run.recipe,
                    "recipe": run.recipe,
                    "dtype": name,
                    "bytes": storage_bytes(model),
                    "seconds": seconds,
                    "calibration_documents": len(subject.calibration) if run.calibrated else 0,
                    "summary": report.summary(),
                }
            )
    for row in rows:
        say(f"{subject.name}: {subject.quality_name} of {row['name']}")
        row["quality"] = subject.quality(variants[row["name"]])
        row["sample"] = subject.sample(variants[row["name"]])
    _time(subject, variants, rows, say)
    for row in rows:
        if row["recipe"]:
            say(f"{subject.name}: saving and loading {row['name']}")
            dtype = getattr(torch, row["dtype"])
            row["reload_equal"] = reloads(subject, variants[row["name"]], dtype, out / row["name"])
    return {
        "quality": subject.quality_name,
        "quality_format": subject.quality_format,
        "setting": subject.setting,
        "prompt": subject.question,
        "rows": rows,
    }


def reloads(subject: Subject, model: nn.Module, dtype: torch.dtype, folder: Path) -> bool:
    """Save, load into a model made from the config alone, and compare outputs bit by bit."""
    qgraft.save(model, folder)
    with contextlib.suppress(ImportError):  # matplotlib is optional
        qgraft.Report.of(model).plot(folder / "report.png")
    loaded = qgraft.load(folder, model=subject.skeleton(dtype))
    return torch.equal(subject.probe(model), subject.probe(loaded))


def write(results: dict[str, Any], out: Path) -> None:
    machine.write_json(results, out / "results.json")
    page = render.markdown(results, machine.in_words(results["machine"]))
    (out / "results.md").write_text(page, encoding="utf-8")


def _time(subject: Subject, variants: dict[str, nn.Module], rows: list[dict], say: Say) -> None:
    for speed in subject.speeds:
        say(f"{subject.name}: speed, {speed.name}")
        runs = {name: partial(speed.run, model) for name, model in variants.items()}
        times = interleaved(runs, budget=SPEED_SECONDS, rounds=speed.rounds)
        for row in rows:
            mine, base = times[row["name"]], times[row["dtype"]]
            row.setdefault("speeds", {})[speed.name] = {
                "tokens_per_s": speed.tokens / mine.median,
                "ratio": base.median / mine.median,
                **mine.to_dict(),
            }


def _loaders(quick: bool) -> list[Callable[[Say], Subject]]:
    def encoder(say: Say) -> Subject:
        say("loading MiniLM-L6-v2")
        calibration, evaluation = models.news(models.CALIBRATION), models.news(models.EVALUATION)
        if quick:
            return SentenceEncoder(
                *models.minilm(), calibration[:16], evaluation, sentences=16, batch=16, rounds=(3, 3)
            )
        return SentenceEncoder(*models.minilm(), calibration, evaluation, sentences=256)

    def language(say: Say) -> Subject:
        say("loading SmolLM2-135M from its GGUF file")
        texts = models.news(models.CALIBRATION)[:DOCUMENTS], models.news(models.EVALUATION)
        return LanguageModel(*models.smollm2(), *texts, windows=WINDOWS)

    return [encoder] if quick else [language, encoder]


def narrator() -> Say:
    """Progress on stderr, with the seconds since the start, which are returned."""
    start = time.perf_counter()

    def say(text: str) -> float:
        seconds = time.perf_counter() - start
        print(f"[{seconds:4.0f} s] {text}", file=sys.stderr, flush=True)
        return seconds

    return say


if __name__ == "__main__":
    sys.exit(main())
