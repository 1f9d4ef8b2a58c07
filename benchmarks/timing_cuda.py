"""Times on a GPU that mean something for a model: weights come from memory, and the host is not in the way.

A layer timed alone over and over finds its weights in the second-level cache, and a small one only measures
how fast Python can launch it. So each run goes over copies of the layer that are larger together than the
cache, inside one CUDA graph. Eager calls over the same copies are timed beside it: what a model without
graphs would see. And the host alone: what a call costs in Python and in the launch before the GPU has to do
anything.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Several times the second-level cache (50 MiB on H100 and H200).
COLD_BYTES = 256 << 20
# A run of fewer calls than this would be close to what a CUDA event can resolve.
LEAST_CALLS = 16

Run = Callable[[], float]


def runs_of(layer: nn.Module, x: Tensor, weight_bytes: int) -> dict[str, Run]:
    """Runs for `timing.interleaved`, each returning the seconds of one call: in a "graph", "eager", and of the "host"
    until the call returns."""
    copies = [copy.deepcopy(layer) for _ in range(max(1, math.ceil(COLD_BYTES / max(weight_bytes, 1))))]
    calls = max(LEAST_CALLS, len(copies))

    def sweep() -> None:
        for module in itertools.islice(itertools.cycle(copies), calls):
            module(x)

    # Kernels are compiled and layouts derived before the capture, on a side stream as capturing asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sweep()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sweep()
    return {
        "graph": _between_events(graph.replay, calls),
        "eager": _between_events(sweep, calls),
        "host": _until_returned(sweep, calls),
    }


def _between_events(call: Callable[[], None], calls: int) -> Run:
    def run() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return run


def _until_returned(call: Callable[[], None], calls: int) -> Run:
    def run() -> float:
        torch.cuda.synchronize()  # an empty queue: the host never has to wait for room in it
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return seconds / calls

    return run
