"""The figures of the tutorial, from the functions that it explains.

    python docs/tools/plots.py               # all of them, into docs/images
    python docs/tools/plots.py clipping      # or by name

Random numbers have fixed seeds: the same library draws the same figure.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import qgraft.functional as QF
from qgraft import Quantizer, Recipe, SVDQW4A4Linear, W8A16Linear
from qgraft.benchmarks import timing
from qgraft.kernels.reference import rotate_groups
from qgraft.layers import SCHEMES
from qgraft.layers.algorithms import smoothing
from qgraft.layers.algorithms.rounding import CLIP_GRID, round_int4, search_group_steps, two_level_scales

IMAGES = Path(__file__).parents[1] / "images"
BLUE, ORANGE, GREEN, GRAY = "#1f77b4", "#d95f02", "#1b9e77", "#999999"
DRAWN: dict[str, Callable[[], Figure]] = {}


def figure(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Decorator: docs/images/<name of the function>.svg, with its underscores as dashes."""
    DRAWN[draw.__name__.replace("_", "-")] = draw
    return draw


def panels(columns: int = 1, height: float = 3.0, **options: Any) -> tuple[Figure, Any]:
    drawn = Figure(figsize=(8, height), layout="constrained")
    axes = drawn.subplots(1, columns, **options)
    for ax in axes if columns > 1 else [axes]:
        ax.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def relative(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    return ((approximation - exact).norm() / exact.norm()).item()


@figure
def sequential() -> Figure:
    """Error of the activations after each block of a made-up model, calibrated in one pass or block after block."""
    torch.manual_seed(0)
    model, data, test = residual_blocks(12)
    exact = after_each_block(model, test)
    drawn, ax = panels()
    for flag, label, color in ((False, "one pass over the float model", ORANGE), (True, "sequential", BLUE)):
        spec = {"scheme": {"name": "w4a16"}, "min_features": 1, "calibration": {"sequential": flag}}
        quantizer = Quantizer(copy.deepcopy(model))
        quantized = quantizer.quantize(Recipe.from_dict(spec), calibration=data, progress=False)
        errors = [100 * relative(a, b) for a, b in zip(after_each_block(quantized, test), exact, strict=True)]
        ax.plot(range(1, len(errors) + 1), errors, "o-", color=color, label=label)
    ax.set(xlabel="blocks", ylabel="error of the output, %", ylim=(0, None))
    ax.legend(frameon=False)
    return drawn


def residual_blocks(count: int, width: int = 128) -> tuple[nn.Module, list[torch.Tensor], torch.Tensor]:
    """Blocks as those of a transformer, without attention; calibration data whose features depend on one another."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = (
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.Linear(2 * width, width),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(count))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    mix = torch.randn(width, width) / width**0.5
    return Model().eval(), [torch.randn(64, width) @ mix for _ in range(64)], torch.randn(512, width) @ mix


@torch.no_grad()
def after_each_block(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [x := block(x) for block in model.blocks]


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
    for w, name, color in ((plain, "rows of different size", BLUE), (outliers, "and outlier columns", ORANGE)):
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
    drawn, axes = panels(2, 3.2, sharey=True)
    for ax, again, title in zip(axes, (naive, layer.dequantize()), ("bfloat16 scale, no clamp", "qgraft"), strict=True):
        flipped = again.sign() * w.float().sign() < 0
        some = torch.rand(w.shape) < 0.003
        ax.plot(w[some & ~flipped].float(), again[some & ~flipped], ".", color=BLUE, markersize=2)
        ax.plot(w[flipped].float(), again[flipped], "x", color=ORANGE)
        ax.set(title=f"{title}: {int(flipped.any(1).sum())} of 256 rows flipped", xlabel="weight")
        ax.locator_params(nbins=5)
    axes[0].set_ylabel("dequantized")
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


def outlier_layer() -> tuple[torch.nn.Linear, torch.Tensor]:
    """The layer and the data of chapter "W4A4 with an SVD branch"."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 384, bias=False)
    linear.weight.data += torch.randn(384, 4) @ torch.randn(4, 512) * 0.02
    x = torch.randn(1200, 512)
    x[:, :8] *= 25
    return linear, x


@figure
def outliers() -> Figure:
    """The largest activation of each feature: as it comes, smoothed, and smoothed and rotated."""
    linear, x = outlier_layer()
    s = smoothing.smooth_by_activations(linear.weight.data, x.abs().amax(0), 0.5)
    drawn, axes = panels(3, 2.6, sharey=True)
    for ax, values, title in zip(
        axes, (x, x / s, rotate_groups(x / s, 64)), ("as it comes", "smoothed", "and rotated"), strict=True
    ):
        peak = values.abs().amax(0) / values.square().mean().sqrt()
        ax.bar(range(128), peak[:128].tolist(), color=[ORANGE if i < 8 else BLUE for i in range(128)], width=1.0)
        ax.set(title=title, xlabel="feature (the first 128)")
    axes[0].set_ylabel("largest / root mean square")
    return drawn


@figure
def svdq_steps() -> Figure:
    """Output error of W4A4 as each part is switched on."""
    linear, x = outlier_layer()
    train, test = x[:800], x[800:]
    steps = {
        "naive": dict(rank=0, smooth="none", rotate=False),
        "+ SVD": dict(rank=32, smooth="none", rotate=False),
        "+ smoothing": dict(rank=32, smooth="activations", rotate=False),
        "+ rotation": dict(rank=32, smooth="activations", rotate=True),
    }
    exact = linear(test)
    errors = {}
    with torch.no_grad():
        for name, options in steps.items():
            layer = SVDQW4A4Linear.from_linear(linear, calibration=train, rounding="rtn", smooth_alpha=0.5, **options)
            errors[name] = 100 * relative(layer(test), exact)
    drawn, ax = panels(1, 2.4)
    bars = ax.barh(list(errors), list(errors.values()), color=[GRAY, BLUE, BLUE, GREEN])
    ax.bar_label(bars, fmt="%.1f %%", padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="relative error of the output, %")
    return drawn


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


@figure
def tiles() -> Figure:
    """One program of a tiled product: a block of rows of x, a block of columns of w, a tile of y."""
    drawn = Figure(figsize=(7, 4.2), layout="constrained")
    ax = drawn.subplots()
    for x0, y0, width, height, name in ((0, 0, 4, 4, "x (M, K)"), (5, 5, 6, 4, "w (K, N)"), (5, 0, 6, 4, "y (M, N)")):
        ax.add_patch(Rectangle((x0, y0), width, height, fill=False, edgecolor="black"))
        ax.annotate(name, (x0 + width / 2, y0 + height + 0.15), ha="center")
    for k in range(4):
        shade = 0.25 + 0.2 * k
        ax.add_patch(Rectangle((k, 2), 1, 1, color=BLUE, alpha=shade))
        ax.add_patch(Rectangle((7, 8 - k), 1.5, 1, color=BLUE, alpha=shade))
    ax.add_patch(Rectangle((7, 2), 1.5, 1, color=ORANGE))
    ax.annotate("BLOCK_M x BLOCK_N:\none program", (8.6, 2.5), va="center")
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
def family() -> Figure:
    """Output error of each layer of the family on the layer with outliers of chapter "W4A4 with an SVD branch"."""
    linear, x = outlier_layer()
    train, test = x[:800], x[800:]
    exact = linear(test)
    errors = {}
    with torch.no_grad():
        for name in ("w8a16", "w8a8", "w8a8_static", "w4a16", "w4a8_svd", "w4a4_svd"):
            layer = SCHEMES[name].from_linear(linear, calibration=train)
            errors[name] = 100 * relative(layer(test), exact)
    drawn, ax = panels(1, 2.8)
    bars = ax.barh(list(errors), list(errors.values()), color=[BLUE if "svd" in name else GRAY for name in errors])
    ax.bar_label(bars, fmt="%.1f %%", padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="relative error of the output, %")
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
    drawn, ax = panels(1, 2.2)
    ratios = {
        "one after the other": one_by_one[0] / one_by_one[1],
        "in turn": in_turn["a"].median / in_turn["b"].median,
    }
    bars = ax.barh(list(ratios), list(ratios.values()), color=[ORANGE, BLUE])
    ax.bar_label(bars, fmt="%.2f", padding=4)
    ax.axvline(2, color=GRAY)
    ax.set(xlabel="time of a / time of b, which is 2 in truth")
    return drawn


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
    ax.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    return drawn


def main(names: list[str], folder: Path = IMAGES) -> None:
    folder.mkdir(exist_ok=True)
    for name in names or DRAWN:
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 9}):
            DRAWN[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
