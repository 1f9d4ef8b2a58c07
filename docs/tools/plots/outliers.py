"""Chapter "Outliers"."""

from matplotlib.figure import Figure

import qgraft.functional as QF
from qgraft.benchmarks.inputs import inputs

from .canvas import BLUE, GRAY, GREEN, ORANGE, figure, panels
from .minilm import AFTER_GELU, AFTER_NORM, sqnr


@figure
def outlier_features() -> Figure:
    """The largest value of each feature of the inputs of two layers, and of each column of their weights."""
    drawn, axes = panels(2, 2.8, sharey=True)
    for ax, name in zip(axes, (AFTER_NORM, AFTER_GELU), strict=True):
        linear, x, _ = inputs(name)
        for values, up, label, color in ((x, 1, "inputs", ORANGE), (linear.weight, -1, "weight, downwards", BLUE)):
            peak = values.abs().amax(0) / values.square().mean().sqrt()
            ax.plot(up * peak, color=color, linewidth=0.7, label=label)
        ax.set(title=name, xlabel="feature")
    axes[0].set_ylabel("largest / root mean square")
    axes[0].legend(frameon=False)
    return drawn


@figure
def outlier_cost() -> Figure:
    """Error of the output when the inputs are rounded, by what shares a step."""
    drawn, axes = panels(2, 2.8, sharey=True)
    ways = {"one step": QF.quantize_per_tensor, "per token": QF.quantize_per_token,
            "per group of 64": lambda x, bits: QF.quantize_per_group(x, 64, bits)}  # fmt: skip
    for ax, name in zip(axes, (AFTER_NORM, AFTER_GELU), strict=True):
        linear, _, x = inputs(name)
        for i, (way, color) in enumerate(zip(ways, (GRAY, BLUE, GREEN), strict=True)):
            rounded = [QF.dequantize(*ways[way](x, bits=bits)) for bits in (8, 4)]
            decibels = [sqnr(linear(values), linear(x)) for values in rounded]
            bars = ax.bar([i, i + 4], decibels, color=color, label=way)
            ax.bar_label(bars, fmt="%.0f")
        ax.set(title=name, xticks=[1, 5], xticklabels=["8 bits", "4 bits"])
    axes[0].set_ylabel("signal to noise, dB")
    axes[1].legend(frameon=False)
    return drawn


@figure
def outlier_tokens() -> Figure:
    """Tokens by features: outliers that stay in their feature, and outliers that come and go."""
    drawn, axes = panels(2, 2.8)
    for ax, name in zip(axes, (AFTER_NORM, AFTER_GELU), strict=True):
        _, _, x = inputs(name)
        part = (x.abs() / x.square().mean().sqrt())[:128]
        loud = x.square().mean(0).topk(24).indices.sort().values
        image = ax.imshow(part[:, loud].clamp_max(20), aspect="auto", cmap="magma_r", interpolation="nearest")
        ax.set(title=name, xlabel="the 24 loudest features", ylabel="token")
        ax.set_xticks([])
    drawn.colorbar(image, ax=axes, label="size / root mean square", shrink=0.9)
    return drawn
