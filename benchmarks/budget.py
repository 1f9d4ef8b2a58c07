"""What a budget of bits buys when it is spent layer by layer, beside uniform recipes of about the same size.

python -m qgraft.benchmarks.budget [--model minilm] [--budget "4.6 bits"] [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import qgraft
from qgraft.recipes import Recipe

from . import entrants, machine, models
from .accuracy import load, score
from .yardsticks import SAMPLES, yardsticks

CANDIDATES, RANKS = ("w4a16", "w4a16_asym", "w8a16"), (4, 8)
UNIFORM = ("w4a16", "w4a16 rank=4", "w4a16_asym", "w4a16 rank=8", "w8a16")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.budget", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(yardsticks()), default="minilm")
    parser.add_argument("--budget", default="4.6 bits")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of calibration")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        models.require()
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    model, data = load(args.model, args.samples)
    data = [{k: v for k, v in batch.items() if k != "logits_to_keep"} for batch in data]
    start = time.perf_counter()
    found = qgraft.allocate(model, args.budget, CANDIDATES, ranks=RANKS, calibration=data, progress=False)
    seconds = time.perf_counter() - start
    print(found, flush=True)
    rows = [_row(args, f"allocated, {args.budget}", model, data, found.recipe)]
    for text in UNIFORM:
        rows.append(_row(args, text, *load(args.model, args.samples), entrants.recipe(text)))
    if args.json:
        results = {"command": machine.command("budget", argv), "model": args.model, "samples": args.samples,
                   "seconds": seconds, "allocation": found.to_dict(), "rows": rows}  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _row(args: argparse.Namespace, name: str, model: nn.Module, data: Any, recipe: Recipe) -> dict[str, Any]:
    """bits: as `allocate` counts them, with biases."""
    quantizer = qgraft.Quantizer(model)
    model = quantizer.quantize(recipe, calibration=data, progress=False)
    layers = quantizer.report.layers
    bits = 8 * sum(r.bytes_after for r in layers) / sum(r.in_features * r.out_features for r in layers)
    scores = score(args.model, model)
    print(f"{name:>24}  {bits:.3f} bits  " + "  ".join(f"{k} {v:.5f}" for k, v in scores.items()), flush=True)
    return {"name": name, "bits": bits, "scores": scores}


if __name__ == "__main__":
    sys.exit(main())
