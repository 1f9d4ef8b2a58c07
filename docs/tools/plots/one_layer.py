"""The layer with planted outliers of chapter "W4A4 with an SVD branch"."""

import torch
from matplotlib.figure import Figure

from qgraft import SVDQW4A4Linear
from qgraft.kernels.reference import rotate_groups
from qgraft.layers import SCHEMES
from qgraft.layers.algorithms import smoothing

from .canvas import BLUE, GRAY, GREEN, ORANGE, bars, figure, panels, relative


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
    return bars(errors, [GRAY, BLUE, BLUE, GREEN], "relative error of the output, %", 2.4)


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
    colors = [BLUE if "svd" in name else GRAY for name in errors]
    return bars(errors, colors, "relative error of the output, %", 2.8)
