"""Time every quantized layer against F.linear and other libraries on this machine, after checking its answers.

    python -m qgraft.benchmarks.run [--device cpu] [--scheme w8a16] [--peer torchao] [--shape 4096x4096]
                                    [--tokens 1,16,256] [--threads 2] [--json FILE]

For each shape and number of tokens all candidates take turns in one process, on random data: our layers, F.linear
in float32 and bfloat16, and each peer of `peers.py` that is installed. What fails the gate of `gate.py` is not
timed; if it is a layer of ours, the exit code is 1. What a peer cannot do is listed with the reason. Caches are
cold (`timing.py`, `timing_cuda.py`); the machine's own limits are measured first (`roofline.py`); the targets of
`targets.py` are judged at the end.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qgraft.layers import SCHEMES

from . import machine, peers, roofline, shapes, targets
from .candidates import not_run_in_words
from .layer_table import layer_table, memory_table, verdict_table
from .measure import measure_shape

# What is measured if nothing is said: the shape that the targets are about, and a few numbers of tokens.
SHAPE = {"cpu": (4096, 4096), "cuda": (8192, 8192)}
TOKENS = {"cpu": (1, 4, 16, 64, 256, 1024), "cuda": (1, 4, 16, 17, 64, 256, 1024, 2048, 4096)}
# More waiting processes than this share of the cores, and the times are those of a busy machine.
BUSY = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False)
    results = measure(args, console)
    verdicts = targets.judge(results["rows"], args.device)
    results = {"command": machine.command("run", argv), **results, "verdicts": [v.to_dict() for v in verdicts]}
    _print_verdicts(verdicts, console)
    if args.json:
        machine.write_json(results, args.json)
    wrong = [row for row in results["rows"] if not row["ok"]]
    for row in wrong:
        n, k = row["shape"]
        formula = "" if row["error_formula"] is None else f"{row['error_formula']:.1e} to its own formula, "
        why = row.get("reason") or f"wrong result ({formula}{row['error_weights']:.1e} to F.linear)"
        print(f"{row['library']} {row['scheme']} {n}x{k}, {row['tokens']} tokens: {why}", file=sys.stderr)
    return 1 if any(row["library"] in ("qgraft", "torch") for row in wrong) else 0


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that is measured, as plain data, with its tables printed as they are done."""
    found = machine.describe(args.device)
    console.print(machine.in_words(found))
    if found["load_average"] is not None and found["load_average"] > BUSY * found["cores"]:
        console.print(
            f"load average {found['load_average']}: other programs are running; only ratios mean anything, if those do"
        )
    ceilings = roofline.measure(args.device)
    console.print(roofline.in_words(ceilings))
    rows, out = [], []
    for n, k in args.shape:
        shape_rows, shape_out = measure_shape(n, k, args.tokens, args.scheme, args.peer, args.device, ceilings)
        console.print(f"\n{n} x {k} on {args.device}")
        console.print(layer_table(shape_rows))
        console.print(memory_table(shape_rows))
        for item in shape_out:
            console.print(not_run_in_words(item))
        rows += shape_rows
        out += shape_out
    versions = {peer.library: peer.version for peer in args.peer if peer.version}
    return {
        "device": args.device,
        "machine": found,
        "peers": versions,
        "ceilings": ceilings,
        "rows": rows,
        "not_run": out,
    }


def _print_verdicts(verdicts: Sequence[targets.Verdict], console: Console) -> None:
    floors = [v for v in verdicts if not v.target.limits]
    aims = [v for v in verdicts if v.target.limits]
    if aims:
        console.print("\nTargets: measured/to reach. NO: missed, ?: not measured.")
        console.print(verdict_table(aims))
    if floors:
        slow = [v for v in floors if not v.ok]
        console.print(f"Never slower than {floors[0].limit:g}x F.linear: {len(floors) - len(slow)} of {len(floors)}")
        for v in slow:
            n, k = v.target.shape
            console.print(f"  MISS: {v.scheme} {v.target.dtype} {n}x{k}, {v.tokens} tokens: {v.value:.2f}x")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qgraft bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheme", action="append", choices=list(SCHEMES), help="may be repeated; default all")
    parser.add_argument("--peer", action="append", help="a library, one of its ways, or none; default the installed")
    parser.add_argument("--shape", action="append", type=_shape, metavar="NxK", help="or a set's name; may be repeated")
    parser.add_argument("--tokens", type=_tokens, metavar="1,4,16")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as many as torch takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.scheme = list(dict.fromkeys(args.scheme or SCHEMES))
    args.shape = list(dict.fromkeys(shape for some in args.shape or [(SHAPE[args.device],)] for shape in some))
    args.tokens = args.tokens or TOKENS[args.device]
    try:
        named = peers.chosen(args.peer)
    except ValueError as error:
        parser.error(f"--peer: {error}")
    args.peer = [peer for peer in named if args.peer or peer.version]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def _shape(text: str) -> tuple[shapes.Shape, ...]:
    try:
        return shapes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
