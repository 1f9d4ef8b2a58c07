"""Chapter "Rotation"."""

import torch
from matplotlib.figure import Figure

import qgraft.functional as QF
from qgraft.benchmarks.inputs import inputs
from qgraft.kernels.reference import rotate_groups

from .canvas import BLUE, GRAY, ORANGE, figure, panels
from .minilm import AFTER_GELU, AFTER_NORM, sqnr


@figure
def rotation_spread() -> Figure:
    """Groups of 64 inputs, each divided by its root mean square: their values, and the largest of each."""
    _, _, x = inputs(AFTER_GELU)
    drawn, (left, right) = panels(2)
    for values, name, color in ((x, "as they come", ORANGE), (rotate_groups(x, 64), "rotated", BLUE)):
        groups = values.unflatten(-1, (-1, 64)).flatten(0, 1)
        groups = groups / groups.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)
        left.hist(groups.flatten(), bins=torch.linspace(-8, 8, 97), histtype="step", density=True, color=color,
                  label=name)  # fmt: skip
        right.hist(groups.abs().amax(-1), bins=torch.linspace(1, 8, 57), histtype="step", density=True, color=color)
    bell = torch.linspace(-5, 5, 101)
    left.plot(bell, torch.exp(-bell.square() / 2) / (2 * torch.pi) ** 0.5, ":", color=GRAY, label="Gaussian")
    left.set(yscale="log", ylim=(1e-5, None), xlabel="value / root mean square of its group", ylabel="density")
    right.set(xlabel="crest factor of a group: largest / root mean square")
    left.legend(frameon=False)
    return drawn


@figure
def rotation_size() -> Figure:
    """Error of int4 inputs with a step for every 64, over how many features are rotated together."""
    drawn, ax = panels()
    for name, color in ((AFTER_NORM, BLUE), (AFTER_GELU, ORANGE)):
        _, _, x = inputs(name)
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if x.shape[1] % size == 0]
        rotated = [rotate_groups(x, size) for size in sizes]
        decibels = [sqnr(QF.dequantize(*QF.quantize_per_group(values, 64, 4)), values) for values in rotated]
        ax.plot(sizes, decibels, "o-", color=color, label=name)
    ax.axvline(64, color=GRAY, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set(xlabel="features rotated together (1: no rotation)", ylabel="signal to noise of x, dB")
    ax.legend(frameon=False)
    return drawn
