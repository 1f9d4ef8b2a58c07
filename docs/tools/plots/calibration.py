"""What is lost from block to block."""

import copy

import torch
from matplotlib.figure import Figure
from torch import nn

from qgraft import Quantizer, Recipe

from .canvas import BLUE, ORANGE, figure, panels, relative


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
