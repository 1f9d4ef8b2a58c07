"""One weight shape: gate every candidate, then time those that are right, in turn; the results as plain rows."""

from collections.abc import Sequence
from typing import Any

import torch

from . import memory, roofline
from .candidates import Candidate, Candidates, in_words
from .peers import Peer
from .timing import Cold, Timing, interleaved, stopwatch

# Seconds of turns for each number of tokens, and their fewest and most: a median of less than 7 says little.
BUDGET, ROUNDS = 4.0, (7, 200)

Row = dict[str, Any]


@torch.no_grad()
def measure_shape(
    n: int,
    k: int,
    tokens: Sequence[int],
    schemes: Sequence[str],
    peers: Sequence[Peer],
    device: str,
    ceilings: roofline.Ceilings,
) -> tuple[list[Row], list[Row]]:
    """Results for a weight of shape (N, K): a row for each candidate and number of tokens, and what was not run."""
    torch.manual_seed(0)
    field = Candidates(n, k, tokens, device)
    for scheme in schemes:
        field.add_scheme(scheme)
    for peer in peers:
        field.add_peer(peer)
    rows = [row for m in field.inputs for row in _measure_tokens(field, m, ceilings)]
    out = [{**item.to_dict(), "shape": [n, k]} for item in field.not_run]
    return rows, out


def _measure_tokens(field: Candidates, tokens: int, ceilings: roofline.Ceilings) -> list[Row]:
    rows, right = [], []
    for candidate in field.all:
        if tokens not in candidate.tokens:
            continue
        x = field.inputs[tokens][candidate.dtype]
        errors = candidate.check(x, candidate.layer(x))
        row = {
            "library": candidate.library,
            "scheme": candidate.scheme,
            "dtype": str(candidate.dtype).removeprefix("torch."),
            "shape": [field.linears[candidate.dtype].out_features, x.shape[1]],
            "tokens": tokens,
            "error_formula": errors.formula,
            "error_weights": errors.weights,
            "ok": errors.ok,
            "weight_bytes": candidate.weight_bytes,
            "held_bytes": candidate.held_bytes,
            "resident_bytes": candidate.resident_bytes,
            "peak_bytes": memory.peak_of(lambda c=candidate, x=x: c.layer(x), field.device),
        }
        rows.append(row)
        if errors.ok:
            right.append((row, candidate, x))
    _time(right, field.device)
    floats = {row["dtype"]: row for row in rows if row["library"] == "torch"}
    for row, candidate, x in right:
        _derive(row, candidate, x, floats[row["dtype"]], ceilings)
    return rows


def _time(right: list[tuple[Row, Candidate, torch.Tensor]], device: str) -> None:
    """Put times into the rows: on a CPU with cold caches; on a GPU in a graph, eager, and on the host alone."""
    options = {"budget": BUDGET, "rounds": ROUNDS}
    if device == "cpu":
        cold = Cold()
        runs = {
            i: stopwatch(lambda c=c, x=x: c.layer(x), before=lambda x=x: cold(x)) for i, (_, c, x) in enumerate(right)
        }
        for i, timing in interleaved(runs, **options).items():
            right[i][0].update(timing.to_dict())
        return
    from .timing_cuda import runs_of

    kinds: dict[str, dict[int, Any]] = {"graph": {}, "eager": {}, "host": {}}
    for i, (row, candidate, x) in enumerate(right):
        try:
            for kind, run in runs_of(candidate.layer, x, candidate.weight_bytes).items():
                kinds[kind][i] = run
        except Exception as error:
            if candidate.library == "qgraft":
                raise
            row |= {"ok": False, "reason": f"not timed: {in_words(error)}"}
    times: dict[str, dict[int, Timing]] = {kind: interleaved(runs, **options) for kind, runs in kinds.items() if runs}
    for i, (row, _, _) in enumerate(right):
        if i in times["eager"]:
            row |= times["graph"][i].to_dict()
            row["eager"] = times["eager"][i].to_dict()
            row["host_us"] = 1e6 * times["host"][i].median


def _derive(row: Row, candidate: Candidate, x: torch.Tensor, base: Row, ceilings: roofline.Ceilings) -> None:
    """What follows from the time: bandwidth, rate, share of the roof, ratio to F.linear with the same input."""
    if "median_ms" not in row or "median_ms" not in base:
        return
    n, k = row["shape"]
    seconds = row["median_ms"] / 1e3
    moved = candidate.weight_bytes + x.element_size() * len(x) * (n + k)
    operations = 2 * len(x) * n * k
    kind = roofline.compute_type(candidate.scheme, row["dtype"])
    row |= {
        "bytes_moved": moved,
        "gb_per_s": moved / seconds / 1e9,
        "tflops": operations / seconds / 1e12,
        "roof_share": roofline.share(ceilings, kind, moved, operations, seconds),
        "ratio": base["median_ms"] / row["median_ms"],
    }
    if "eager" in row:
        row["eager_ratio"] = base["eager"]["median_ms"] / row["eager"]["median_ms"]
