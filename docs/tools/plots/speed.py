"""Tiles, the roof, and honest timing."""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qgraft.benchmarks import timing

from .canvas import BLUE, GRAY, GREEN, ORANGE, bars, figure, panels


@figure
def tiles() -> Figure:
    """One program of a tiled product: a block of rows of x, a block of columns of w, a tile of y."""
    drawn = Figure(figsize=(7, 4.2), layout="constrained")
    ax = drawn.subplots()
    for x0, y0, width, height, name in ((0, 0, 4, 4, "x (M, K)"), (5, 5, 6, 4, "wᵀ (K, N)"), (5, 0, 6, 4, "y (M, N)")):
        ax.add_patch(Rectangle((x0, y0), width, height, fill=False, edgecolor="black"))
        ax.annotate(name, (x0 + width / 2, y0 + height + 0.15), ha="center")
    for k in range(4):
        shade = 0.25 + 0.2 * k
        ax.add_patch(Rectangle((k, 2), 1, 1, color=BLUE, alpha=shade))
        ax.add_patch(Rectangle((7, 8 - k), 1.5, 1, color=BLUE, alpha=shade))
    ax.add_patch(Rectangle((7, 2), 1.5, 1, color=ORANGE))
    ax.annotate("BLOCK_M x BLOCK_N:\none program", (7.75, 1.4), ha="center", va="center", fontsize=9)
    ax.annotate("k = 0, 1, 2, 3: the loop", (0.1, 1.5), va="center", fontsize=9)
    ax.set(xlim=(-0.2, 11.2), ylim=(-0.2, 9.6), aspect="equal")
    ax.axis("off")
    return drawn


@figure
def regimes() -> Figure:
    """The least time of a 4096 x 4096 layer on an H200: that of reading the weights, or that of multiplying."""
    bandwidth, float_rate, int8_rate = 4.8e12, 989e12, 1979e12
    n = k = 4096
    tokens = torch.logspace(0, 12, 200, base=2)
    drawn, ax = panels(1, 3.2)
    lines = (("bfloat16", 16, float_rate, GRAY), ("W8A16", 8, float_rate, BLUE), ("W4A16", 4.25, float_rate, GREEN))
    for name, bits, rate, color in (*lines, ("W4A8", 4.4, int8_rate, ORANGE)):
        reading = torch.full_like(tokens, n * k * bits / 8 / bandwidth)
        multiplying = 2 * tokens * n * k / rate
        ax.loglog(tokens, 1e6 * torch.maximum(reading, multiplying), color=color, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks := [1, 4, 16, 64, 256, 1024, 4096], [str(t) for t in ticks])
    ax.set(xlabel="tokens", ylabel="microseconds, at least")
    ax.legend(frameon=False)
    return drawn


@figure
def turns() -> Figure:
    """Two candidates on a machine whose speed drifts: timed one after the other, and in turn."""
    clock = [0]

    def drifting(seconds: float) -> Callable[[], float]:
        def call() -> float:
            clock[0] += 1
            return seconds * (2.5 if clock[0] % 400 > 260 else 1)

        return call

    in_turn = timing.interleaved({"a": drifting(2.0), "b": drifting(1.0)}, budget=0, rounds=(200, 200))
    clock[0] = 0
    one_by_one = [torch.tensor([call() for _ in range(200)]).median().item() for call in (drifting(2.0), drifting(1.0))]
    ratios = {
        "one after the other": one_by_one[0] / one_by_one[1],
        "in turn": in_turn["a"].median / in_turn["b"].median,
    }
    drawn = bars(ratios, [ORANGE, BLUE], "time of a / time of b, which is 2 in truth", 2.2, "%.2f")
    drawn.axes[0].axvline(2, color=GRAY)
    return drawn
