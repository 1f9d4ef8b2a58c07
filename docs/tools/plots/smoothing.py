"""Chapter "Smoothing"."""

import torch
from matplotlib.figure import Figure

from qgraft import SVDQW4A4Linear
from qgraft.benchmarks.inputs import inputs
from qgraft.layers import Stats
from qgraft.layers.algorithms.smoothing import smooth_by_activations

from .canvas import BLUE, GRAY, GREEN, ORANGE, figure, panels
from .minilm import AFTER_NORM, PLAIN, sqnr


@figure
def smoothing_sides() -> Figure:
    """Features of x and columns of W, sorted by the size of x, before and after."""
    linear, x, _ = inputs(AFTER_NORM)
    order = x.abs().amax(0).argsort(descending=True)
    drawn, axes = panels(3, 2.6, sharey=True)
    for ax, alpha in zip(axes, (None, 0.5, 1.0), strict=True):
        s = torch.ones(x.shape[1]) if alpha is None else smooth_by_activations(linear.weight, x.abs().amax(0), alpha)
        for values, name, color in ((x / s, "x / s", ORANGE), (linear.weight * s, "W diag(s)", BLUE)):
            peak = values.abs().amax(0)
            ax.semilogy(peak[order] / peak.median(), color=color, linewidth=0.8, label=name)
        ax.set(title="as it comes" if alpha is None else f"alpha {alpha:g}", xlabel="features by size of x")
    axes[0].set_ylabel("largest / median of those")
    axes[2].legend(frameon=False)
    return drawn


@figure
def smoothing_alpha() -> Figure:
    """Error of the output over alpha, for three kinds of layer."""
    linear, train, test = inputs(AFTER_NORM)
    rows = torch.nn.Linear(linear.in_features, 512, bias=False).requires_grad_(False)
    rows.weight.data = linear.weight[::3]
    stats = Stats(SVDQW4A4Linear.needs)
    stats.update(train)
    test = test[::4]
    exact = rows(test)
    alphas = [0, 0.25, 0.5, 0.75, 1.0]
    kinds = {
        "4 bits alone": (dict(rank=0, rotate=False), GRAY),
        "with the rotation": (dict(rank=0), BLUE),
        "with the rotation and a branch of rank 32": (dict(rank=32), GREEN),
    }
    drawn, ax = panels()
    for name, (options, color) in kinds.items():
        decibels = []
        for alpha in alphas:
            made = SVDQW4A4Linear.from_linear(rows, stats=stats, smooth_alpha=alpha, **PLAIN, **options)
            decibels.append(sqnr(made(test), exact))
        ax.plot(alphas, decibels, "o-", color=color, label=name, markersize=3)
    ax.set(xlabel="alpha", ylabel="signal to noise, dB")
    ax.legend(frameon=False)
    return drawn
