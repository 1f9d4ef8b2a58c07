"""Chapter "The low-rank branch"."""

import torch
from matplotlib.figure import Figure

from qgraft import SVDQW4A4Linear
from qgraft.benchmarks.inputs import inputs
from qgraft.layers import Stats
from qgraft.layers.algorithms.smoothing import smooth_by_activations

from .canvas import BLUE, GRAY, GREEN, ORANGE, figure, panels
from .minilm import AFTER_NORM, PLAIN, sqnr


@figure
def low_rank_spectrum() -> Figure:
    """Singular values of a real weight, as it comes and smoothed, and of a Gaussian one of the same norm."""
    linear, x, _ = inputs(AFTER_NORM)
    s = smooth_by_activations(linear.weight, x.abs().amax(0), 1.0)
    noise = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0))
    drawn, (left, right) = panels(2)
    kinds = ((noise, "Gaussian", GRAY), (linear.weight, "weight", BLUE), (linear.weight * s, "smoothed", ORANGE))
    for w, name, color in kinds:
        values = torch.linalg.svdvals(w / w.norm())
        left.semilogy(range(1, len(values) + 1), values, color=color, label=name)
        right.plot(range(1, len(values) + 1), 100 * values.square().cumsum(0), color=color, label=name)
    for ax in (left, right):
        ax.axvline(32, color=GREEN, linestyle=":", label="rank 32")
        ax.set_xlabel("rank")
    left.set(ylabel="singular value / norm")
    right.set(ylabel="share of the squared norm, %")
    left.legend(frameon=False)
    return drawn


@figure
def low_rank_pays() -> Figure:
    """Signal to noise of the output, over the bits that branches of rank 0 to 64 make a weight cost."""
    linear, train, test = inputs(AFTER_NORM)
    n, k = linear.weight.shape
    stats = Stats(SVDQW4A4Linear.needs)
    stats.update(train)
    test = test[::4]
    exact = linear(test)
    ranks = (0, 16, 32, 64)
    drawn, ax = panels()
    kinds = {"smoothed, alpha 1": (dict(smooth_alpha=1.0), ORANGE), "not smoothed": (dict(smooth="none"), BLUE)}
    for name, (options, color) in kinds.items():
        made = [SVDQW4A4Linear.from_linear(linear, stats=stats, rank=r, **PLAIN, **options) for r in ranks]
        ax.plot(ranks, [sqnr(q(test), exact) for q in made], "o-", color=color, label=name)
    costs = [4 + 8 / 64 + 16 * rank * (n + k) / (n * k) for rank in ranks]
    ax.set_xticks(ranks, [f"{rank}\n{bits:.1f} bits" for rank, bits in zip(ranks, costs, strict=True)])
    ax.set(xlabel=f"rank, and what a weight of this {n} x {k} layer costs", ylabel="signal to noise, dB")
    ax.legend(frameon=False)
    return drawn
