"""What this machine can do at best, measured with torch's own routines, and which share of that a layer reaches.

A product of (M, K) and (K, N) moves B bytes at least (weights, input, output; each once) and does 2 M N K
operations. It can take no less than B / bandwidth and no less than operations / peak; the larger of the two is
its time at the roof, and the share of the roof is that time over the measured one.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Larger than any cache, so that it is memory that is measured.
COPY_BYTES = 256 << 20
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
SECONDS = 0.5  # for each measurement

# The type that a scheme's large product is made in, where that is not the type of its input.
INTEGER = ("w8a8", "w8a8_static", "w4a4_svd", "w4a8_svd", "bitnet")
Ceilings = dict[str, Any]


def measure(device: str) -> Ceilings:
    """Bandwidths in GB/s and the peak of square products in TFLOP/s (for int8: 10^12 operations), by type."""
    copy, read = _bandwidths(device)
    peaks = {}
    for side in SIDES[device]:
        for name, call in _products(side, device).items():
            try:
                call()
            except (RuntimeError, NotImplementedError):
                continue  # this torch has no such product on this device
            rate = 2 * side**3 / _best(call, device) / 1e12
            kind = name.split()[0]
            peaks[kind] = max(rate, peaks.get(kind, 0.0))
    return {"copy_gb_per_s": copy, "read_gb_per_s": read, "matmul_tflops": peaks}


def in_words(ceilings: Ceilings) -> str:
    """One line for a caption."""
    peaks = ", ".join(f"{kind} {rate:.3g}" for kind, rate in ceilings["matmul_tflops"].items())
    copy, read = ceilings["copy_gb_per_s"], ceilings["read_gb_per_s"]
    return f"measured limits: copy {copy:.3g} GB/s, read {read:.3g} GB/s; products in TFLOP/s: {peaks}"


def bandwidth(ceilings: Ceilings) -> float:
    """GB/s: a copy writes as well, which on a CPU costs more than what it counts, so reading alone may be faster."""
    return max(ceilings["copy_gb_per_s"], ceilings["read_gb_per_s"])


def compute_type(scheme: str, dtype: str) -> str:
    """The type whose peak bounds a scheme with input of `dtype`."""
    return "int8" if scheme in INTEGER else dtype


def share(ceilings: Ceilings, kind: str, moved: int, operations: int, seconds: float) -> float | None:
    """Time at the roof / measured time; None if the peak of this type was not measured."""
    peak = ceilings["matmul_tflops"].get(kind)
    if peak is None:
        return None
    roof = max(moved / (bandwidth(ceilings) * 1e9), operations / (peak * 1e12))
    return roof / seconds


def _bandwidths(device: str) -> tuple[float, float]:
    source = torch.ones(COPY_BYTES // 4, device=device)
    copy = torch.empty_like(source)
    seconds = _best(lambda: copy.copy_(source), device), _best(source.sum, device)
    return 2 * COPY_BYTES / seconds[0] / 1e9, COPY_BYTES / seconds[1] / 1e9


def _products(side: int, device: str) -> dict[str, Callable[[], Tensor]]:
    a, b = torch.randn(2, side, side, device=device)
    codes = torch.randint(-127, 128, (2, side, side), device=device, dtype=torch.int8)
    pairs = {"float32": (a, b), "bfloat16": (a.bfloat16(), b.bfloat16())}
    calls = {name: lambda pair=pair: F.linear(*pair) for name, pair in pairs.items()}
    # Which side may be transposed, and which is faster so, differs between devices.
    calls["int8 transposed"] = lambda: torch._int_mm(codes[0], codes[1].t())
    calls["int8 plain"] = lambda: torch._int_mm(codes[0], codes[1])
    return calls


def _best(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest call: a ceiling is what was reached once. The first call only warms up."""
    calls = 10 if device == "cuda" else 1  # between two synchronizations

    def once() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    once()
    end = time.perf_counter() + SECONDS
    best = once()
    while time.perf_counter() < end:
        best = min(best, once())
    return best
