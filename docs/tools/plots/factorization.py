"""How much of a weight a few directions hold."""

import torch
from matplotlib.figure import Figure

from .canvas import BLUE, GRAY, ORANGE, figure, panels


@figure
def spectrum() -> Figure:
    """Singular values: of a Gaussian weight, of one with structure, and what rank the shares of energy ask for."""
    torch.manual_seed(0)
    gaussian = torch.randn(384, 512)
    structured = torch.randn(384, 60) @ torch.randn(60, 512) / 7 + 0.2 * torch.randn(384, 512)
    drawn, (left, right) = panels(2)
    for w, name, color in ((gaussian, "Gaussian", GRAY), (structured, "60 directions and noise", BLUE)):
        s = torch.linalg.svdvals(w)
        energy = s.square().cumsum(0) / s.square().sum()
        left.semilogy(s / s[0], color=color, label=name)
        right.plot(energy, color=color, label=name)
    right.axvline(384 * 512 // (384 + 512), color=ORANGE, label="from here on two factors save nothing")
    left.set(xlabel="index", ylabel="singular value / largest")
    right.set(xlabel="rank", ylabel="share of the energy")
    right.legend(frameon=False, fontsize=8)
    return drawn
