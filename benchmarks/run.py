"""Time every quantized layer against F.linear on this machine, after checking that its answer is right.

    python -m qgraft.benchmarks.run [--device cpu] [--scheme w8a16] [--shape 4096x4096] [--tokens 1,16,256]
                                    [--threads 2] [--json FILE]

For each shape and number of tokens all candidates take turns in one process, on random data: each layer, and
F.linear in float32 and bfloat16. A layer that fails the gate of `gate.py` is not timed, and the exit code is
1. On a GPU the weights are cold and the calls are in a CUDA graph (see `timing_cuda.py`).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from qgraft.layers import SCHEMES, QuantLinear, storage_bytes

from . import gate, machine
from .layer_table import layer_table, sizes
from .timing import Timing, interleaved, stopwatch

# The types of input that each scheme is timed with: those of the models that it is for.
INPUTS = {"w8a32": (torch.float32,), "w4a4_svd": (torch.bfloat16, torch.float32)}
INPUTS_OTHERS = (torch.bfloat16,)
BASELINES = {torch.float32: "F.linear float32", torch.bfloat16: "F.linear bfloat16"}
# Seconds of turns for each number of tokens, and their fewest and most: a median of less than 7 says little.
BUDGET, ROUNDS = 2.0, (7, 200)

Row = dict[str, Any]


@dataclass
class Candidate:
    """A layer, and the input that it is timed with. Anything that can be called and deep-copied will do."""

    layer: nn.Module
    x: Tensor

    @property
    def bytes(self) -> int:
        return storage_bytes(self.layer)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
    found = machine.describe(args.device)
    console.print(machine.in_words(found))
    rows = []
    for n, k in args.shape:
        rows += (shape_rows := measure_shape(n, k, args.tokens, args.scheme, args.device))
        console.print()
        console.print(f"{n} x {k} on {args.device}: {sizes(shape_rows)}")
        console.print(layer_table(shape_rows))
    if args.json:
        command = machine.command("run", argv)
        data = {"command": command, "machine": found, "device": args.device, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        n, k = row["shape"]
        errors = f"{row['error_formula']:.1e} to its own formula, {row['error_weights']:.1e} to F.linear"
        print(f"{row['scheme']} {n}x{k}, {row['tokens']} tokens: wrong result ({errors})", file=sys.stderr)
    return 1 if wrong else 0


@torch.no_grad()
def measure_shape(n: int, k: int, tokens: Sequence[int], schemes: Sequence[str], device: str) -> list[Row]:
    """Rows of the results for one weight of shape (N, K)."""
    torch.manual_seed(0)
    linears = {torch.float32: nn.Linear(k, n, device=device)}
    linears[torch.float32].weight.normal_(std=k**-0.5)
    linears[torch.bfloat16] = nn.Linear(k, n, device=device, dtype=torch.bfloat16)
    linears[torch.bfloat16].load_state_dict(linears[torch.float32].state_dict())
    layers = {
        (scheme, dtype): SCHEMES[scheme].from_linear(linears[dtype])
        for scheme in schemes
        for dtype in INPUTS.get(scheme, INPUTS_OTHERS)
    }
    rows = []
    for m in tokens:
        inputs = {dtype: torch.randn(m, k, device=device).to(dtype) for dtype in linears}
        rows += measure_tokens(layers, linears, inputs)
    return rows


def measure_tokens(
    layers: dict[tuple[str, torch.dtype], QuantLinear],
    linears: dict[torch.dtype, nn.Linear],
    inputs: dict[torch.dtype, Tensor],
) -> list[Row]:
    """Gate, then time, all layers and both float baselines with the same number of tokens."""
    errors = {}
    for (scheme, dtype), layer in layers.items():
        x = inputs[dtype]
        errors[scheme, dtype] = gate.check(layer, linears[dtype], x, layer(x))
    candidates = {BASELINES[dtype]: Candidate(linear, inputs[dtype]) for dtype, linear in linears.items()}
    candidates |= {key: Candidate(layer, inputs[key[1]]) for key, layer in layers.items() if errors[key].ok}
    times, eager = _times(candidates)
    rows = []
    for (scheme, dtype), layer in layers.items():
        key, base, x = (scheme, dtype), BASELINES[dtype], inputs[dtype]
        row = {
            "scheme": scheme,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [layer.out_features, layer.in_features],
            "tokens": len(x),
            "error_formula": errors[key].formula,
            "error_weights": errors[key].weights,
            "ok": errors[key].ok,
            "weight_bytes": storage_bytes(layer),
            "float_bytes": storage_bytes(linears[dtype]),
            "baselines": {name: times[name].to_dict() for name in BASELINES.values()},
        }
        if errors[key].ok:
            moved = row["weight_bytes"] + x.element_size() * len(x) * (layer.in_features + layer.out_features)
            row |= times[key].to_dict()
            row["gb_per_s"] = moved / times[key].median / 1e9
            row["ratio"] = times[base].median / times[key].median
            if eager:
                row["eager"] = eager[key].to_dict()
                row["eager_ratio"] = eager[base].median / eager[key].median
        rows.append(row)
    return rows


def _times(candidates: dict[Any, Candidate]) -> tuple[dict[Any, Timing], dict[Any, Timing]]:
    """Times of a call, by candidate: on a GPU in a graph and eager, on a CPU just the one kind."""
    if not next(iter(candidates.values())).x.is_cuda:
        runs = {key: stopwatch(lambda c=c: c.layer(c.x)) for key, c in candidates.items()}
        return interleaved(runs, budget=BUDGET, rounds=ROUNDS), {}
    from .timing_cuda import graph_and_eager

    pairs = {key: graph_and_eager(c.layer, c.x, c.bytes) for key, c in candidates.items()}
    graphs, eagers = ({key: pair[i] for key, pair in pairs.items()} for i in (0, 1))
    options = {"budget": BUDGET, "rounds": ROUNDS}
    return interleaved(graphs, **options), interleaved(eagers, **options)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qgraft bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheme", action="append", choices=list(SCHEMES), help="may be repeated; default all")
    parser.add_argument("--shape", action="append", type=_shape, metavar="NxK", help="may be repeated")
    parser.add_argument("--tokens", type=_tokens, default=_tokens("1,4,16,64,256,1024"), metavar="1,4,16")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as many as torch takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.scheme = list(dict.fromkeys(args.scheme or SCHEMES))
    args.shape = args.shape or [(1024, 1024), (4096, 4096)]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no shape: write NxK, out x in features") from None
    if min(n, k) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': both sides must be at least 1")
    return n, k


def _tokens(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of positive numbers: write 1,16,256")
    return counts


if __name__ == "__main__":
    sys.exit(main())
