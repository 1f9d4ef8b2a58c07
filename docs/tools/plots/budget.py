"""What a budget of bits buys."""

import copy

import torch
from matplotlib.figure import Figure

from qgraft import Quantizer, Recipe, allocate

from .calibration import residual_blocks
from .canvas import BLUE, GRAY, ORANGE, figure, panels, relative


@figure
def budget() -> Figure:
    """Error of a made-up model over its bits: allocated, predicted and measured, beside two uniform recipes."""
    torch.manual_seed(0)
    model, data, test = residual_blocks(8)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.down.weight *= 2.0 ** (i % 4 - 1)  # blocks that add little, and blocks that add much
        exact = model(test)

    def measured(recipe: Recipe | str) -> float:
        quantized = Quantizer(copy.deepcopy(model)).quantize(recipe, calibration=data, progress=False)
        with torch.no_grad():
            return relative(quantized(test), exact)

    recipes = ("w4a16", "w8a16")
    bits, predicted, truth = [], [], []
    for wanted in torch.linspace(4.5, 8, 8).tolist():
        found = allocate(model, f"{wanted:.2f} bits", recipes, calibration=data, progress=False)
        bits.append(found.bits)
        predicted.append(found.error**0.5)
        truth.append(measured(found.recipe))
    drawn, ax = panels(1, 3.0)
    ax.plot(bits, [100 * e for e in predicted], "--", color=GRAY, label="allocated, predicted")
    ax.plot(bits, [100 * e for e in truth], "o-", color=BLUE, label="allocated, measured")
    for name in recipes:
        plan = Quantizer(model).plan(name)
        size = 8 * sum(layer.bytes_after for layer in plan.todo) / sum(layer.weights for layer in plan.todo)
        ax.plot(
            size, 100 * measured(name), "s", color=ORANGE, label="the same for all layers" if name == "w4a16" else None
        )
        ax.annotate(name, (size, 100 * measured(name)), xytext=(6, 6), textcoords="offset points")
    ax.set(xlabel="bits a weight", ylabel="error of the output, %", ylim=(0, None))
    ax.legend(frameon=False)
    return drawn
