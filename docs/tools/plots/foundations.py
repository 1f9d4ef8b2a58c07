"""Bits, grids, granularity, clipping, and the sign that flips."""

import torch
from matplotlib.figure import Figure

import qgraft.functional as QF
from qgraft import W8A16Linear
from qgraft.layers.algorithms.rounding import CLIP_GRID

from .canvas import BLUE, GRAY, GREEN, ORANGE, figure, panels, relative


@figure
def bits() -> Figure:
    """Size and error of one weight over the number of bits."""
    torch.manual_seed(0)
    w = torch.randn(256, 4096)
    widths = list(range(2, 9))
    errors = [100 * relative(QF.absmax_quantize(w, b)[1], w) for b in widths]
    grouped = [100 * relative(QF.dequantize(*QF.quantize_per_group(w, 64, b)), w) for b in widths]
    drawn, (left, right) = panels(2)
    left.bar(["32", "16", "8", "4"], [8e9 * b / 8 / 2**30 for b in (32, 16, 8, 4)], color=[GRAY, GRAY, BLUE, BLUE])
    left.set(xlabel="bits a weight", ylabel="GiB", title="8 billion weights")
    right.semilogy(widths, errors, "o-", color=ORANGE, label="one scale for all")
    right.semilogy(widths, grouped, "s-", color=BLUE, label="a scale for every 64")
    right.set(xlabel="bits a weight", ylabel="relative error, %", title="error of a Gaussian weight", xticks=widths)
    right.legend(frameon=False)
    return drawn


@figure
def grids() -> Figure:
    """Where the codes lie: symmetric and asymmetric, on values that are not centred."""
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(4000) * 1.5)
    drawn, axes = panels(2, 2.6, sharey=True)
    for ax, symmetric in zip(axes, (True, False), strict=True):
        codes, scale, zero_point = QF.quantize_per_tensor(x, bits=4, symmetric=symmetric)
        grid = scale * (torch.arange(-7 if symmetric else -8, 8) - zero_point)
        ax.hist(x.numpy(), bins=60, color=GRAY)
        for value in grid.tolist():
            ax.axvline(value, color=BLUE, linewidth=0.8)
        ax.axvline(0, color=ORANGE, linewidth=1.2)
        name = "symmetric" if symmetric else "asymmetric"
        error = 100 * relative(QF.dequantize(codes, scale, zero_point), x)
        ax.set(title=f"{name}, zero point {int(zero_point)}: error {error:.1f} %", yscale="log", xlabel="GELU outputs")
    return drawn


@figure
def granularity() -> Figure:
    """Error of int4 over the number of weights that share a scale, with and without outlier columns."""
    torch.manual_seed(0)
    plain = torch.randn(256, 4096) * torch.rand(256, 1) * 2
    outliers = plain.clone()
    outliers[:, ::97] *= 12
    sizes = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    drawn, ax = panels(1, 3.2)
    for w, name, color in ((plain, "rows of different size", BLUE), (outliers, "with outlier columns", ORANGE)):
        errors = [100 * relative(QF.dequantize(*QF.quantize_per_group(w, g, 4)), w) for g in sizes]
        ax.plot(sizes, errors, "o-", color=color, label=f"{name}, per group")
        whole = 100 * relative(QF.dequantize(*QF.quantize_per_tensor(w, 4)), w)
        ax.axhline(whole, color=color, linestyle=":", label=f"{name}, one scale for the tensor")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(s) for s in sizes])
    ax.set(xlabel="weights that share a scale (4096: the row)", ylabel="relative error, %")
    ax.legend(frameon=False, fontsize=8)
    return drawn


@figure
def clipping() -> Figure:
    """Error over the step, as a share of absmax / largest code: clipping pays at 4 bits and not at 8."""
    torch.manual_seed(0)
    groups = torch.randn(4096, 64)
    drawn, axes = panels(2)
    for ax, bits, ratios in zip(
        axes, (4, 8), (torch.linspace(0.4, 1.1, 36), torch.linspace(0.9, 1.1, 41)), strict=True
    ):
        top = 2 ** (bits - 1) - 1
        step = groups.abs().amax(1, keepdim=True) / top
        errors = [100 * relative((groups / (step * r)).round().clamp(-top, top) * step * r, groups) for r in ratios]
        ax.plot(ratios, errors, color=BLUE)
        ax.axvline(1, color=GRAY, linewidth=0.8)
        ax.set(xlabel="step, as a share of absmax / largest code", ylabel="relative error, %", title=f"{bits} bits")
        ax.locator_params(axis="x", nbins=5)
        if bits == 4:
            ax.axvspan(min(CLIP_GRID), max(CLIP_GRID), color=GREEN, alpha=0.15, label="searched by qgraft")
            ax.legend(frameon=False)
    return drawn


@figure
def sign_flip() -> Figure:
    """What a weight becomes, against what it was, when the scale is kept in bfloat16 and nothing clamps."""
    torch.manual_seed(0)
    w = (torch.randn(256, 1024) * 0.02).bfloat16()
    scale = (w.abs().amax(1, keepdim=True).float() / 127).bfloat16()
    wrapped = ((w / scale).round().to(torch.int32) + 128) % 256 - 128
    naive = wrapped * scale.float()
    layer = W8A16Linear(1024, 256, bias=False)
    layer.quantize(w)
    some = torch.rand(w.shape) < 0.003
    trapped = naive.sign() * w.float().sign() < 0
    drawn, axes = panels(2, 3.2, sharex=True, sharey=True)
    for ax, again, title in zip(axes, (naive, layer.dequantize()), ("bfloat16 scale, no clamp", "qgraft"), strict=True):
        flipped = (again.sign() * w.float().sign() < 0).any(1).sum()
        ax.plot(w[some & ~trapped].float(), again[some & ~trapped], ".", color=BLUE, markersize=2)
        ax.plot(w[trapped].float(), again[trapped], "x", color=ORANGE)
        ax.set(title=f"{title}: {int(flipped)} of 256 rows flipped", xlabel="weight")
        ax.locator_params(nbins=5)
    axes[0].set_ylabel("dequantized")
    return drawn
