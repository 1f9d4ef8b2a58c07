"""Times of several candidates, taken in turn: a slow minute of the machine then falls on all alike."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Timing:
    """The seconds that one candidate took, run by run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    def to_dict(self) -> dict[str, float | int]:
        """Milliseconds, for JSON."""
        return {
            "median_ms": 1e3 * self.median,
            "p10_ms": 1e3 * self.percentile(10),
            "p90_ms": 1e3 * self.percentile(90),
            "runs": len(self.seconds),
        }


def interleaved(
    runs: Mapping[str, Callable[[], float]], *, budget: float, rounds: tuple[int, int]
) -> dict[str, Timing]:
    """Run every candidate once a round, in a new order each time.

    runs: functions that do their work and return the seconds that it took.
    budget: seconds to spend; `rounds` says the fewest and the most rounds that this may mean. A round before
    the first, which does not count, warms up and tells how long one takes.
    """
    start = time.perf_counter()
    for run in runs.values():
        run()
    per_round = max(time.perf_counter() - start, 1e-9)
    count = min(max(int(budget / per_round), rounds[0]), rounds[1])
    order, shuffle = list(runs), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        shuffle(order)
        for name in order:
            seconds[name].append(runs[name]())
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def stopwatch(call: Callable[[], object], before: Callable[[], object] | None = None) -> Callable[[], float]:
    """A run for `interleaved` from a function that returns when its work is done, as on a CPU. What `before` does
    first is not timed."""

    def run() -> float:
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


class Cold:
    """Empties the caches of the CPU, as a model does: by the time that it comes back to a layer it has read all its
    other weights. The input stays warm, as the layer before leaves it."""

    def __init__(self) -> None:
        self._other = torch.ones(max(64 << 20, 2 * last_level_cache()) // 4)

    def __call__(self, x: Tensor) -> None:
        self._other.sum()
        x.sum()


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [path.read_text(encoding="utf-8").strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)
