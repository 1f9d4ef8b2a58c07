"""What int4 makes of a weight: its levels, and the steps of its groups."""

import torch
from matplotlib.figure import Figure

from qgraft.layers.algorithms.rounding import round_int4, search_group_steps, two_level_scales

from .canvas import BLUE, GRAY, ORANGE, figure, panels


@figure
def rounded_rows() -> Figure:
    """One row of a weight and the levels that it may take, at 4 bits."""
    torch.manual_seed(3)
    w = torch.randn(1, 64)
    step = search_group_steps(w, 64)
    again = round_int4(w, step) * step
    drawn, ax = panels(1, 2.6)
    for level in range(-8, 8):
        ax.axhline(level * step.item(), color=GRAY, linewidth=0.4)
    ax.vlines(range(64), w[0], again[0], color=ORANGE, linewidth=1)
    ax.plot(w[0], "o", color=BLUE, markersize=3, label="weight")
    ax.plot(again[0], "_", color=ORANGE, markersize=6, label="what int4 makes of it")
    ax.set(xlabel="one group of 64", ylabel="value")
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # a point lies low
    return drawn


@figure
def group_steps() -> Figure:
    """The steps of one row: searched, and the same as one float times an integer."""
    torch.manual_seed(0)
    w = torch.randn(8, 2048) * torch.rand(8, 32).mul(3).exp().repeat_interleave(64, 1)
    steps = search_group_steps(w, 64)[0]
    scale, integer = two_level_scales(w, 64)
    drawn, ax = panels(1, 2.8)
    ax.step(range(32), steps, where="mid", color=GRAY, linewidth=3, label="searched, a float each")
    ax.step(range(32), (scale[0] * integer[0]), where="mid", color=BLUE, label="two-level: float of the row x 1..16")
    ax.set(xlabel="group of 64 weights", ylabel="step")
    ax.legend(frameon=False)
    return drawn
