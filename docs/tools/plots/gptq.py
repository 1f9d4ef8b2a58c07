"""Chapter "GPTQ"."""

from unittest import mock

import torch
from matplotlib.figure import Figure
from torch import Tensor

from qgraft.benchmarks.inputs import inputs
from qgraft.layers.algorithms import gptq
from qgraft.layers.algorithms.rounding import round_int4, search_group_steps

from .canvas import BLUE, GRAY, ORANGE, figure, panels
from .minilm import AFTER_NORM


def second_moment(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def power(weight: Tensor, moment: Tensor) -> Tensor:
    """The mean of |x W^T|^2 over inputs of this second moment."""
    return ((weight @ moment) * weight).sum()


@figure
def gptq_gain() -> Figure:
    """Error of the output on tokens that calibration saw and on others, over damping and over the number of tokens."""
    linear, train, test = inputs(AFTER_NORM)
    weight = linear.weight[::6]
    steps = search_group_steps(weight, 64)
    wide = steps.repeat_interleave(64, 1)

    def decibels(codes: Tensor, moment: Tensor) -> float:
        error = weight - codes * wide
        return (10 * (power(weight, moment) / power(error, moment)).log10()).item()

    def rounded(moment: Tensor, damping: float = gptq.DAMPING) -> Tensor:
        with mock.patch.object(gptq, "DAMPING", damping):
            return gptq.gptq_int4(weight, steps, moment, 64)

    drawn, (left, right) = panels(2, sharey=True)
    dampings = (0.0003, 0.003, 0.03, 0.1, 0.3, 1.0)
    counts = (64, 256, 512, 1024, len(train))
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    few, all_of_it, others = (
        [second_moment(shuffled[:count]) for count in counts],
        second_moment(train),
        second_moment(test),
    )
    by_damping = [(all_of_it, rounded(all_of_it, damping)) for damping in dampings]
    by_tokens = [(moment, rounded(moment)) for moment in few]
    nearest = decibels(round_int4(weight, wide), others)
    for ax, grid, found in ((left, dampings, by_damping), (right, counts, by_tokens)):
        on_seen = [decibels(codes, moment) for moment, codes in found]
        ax.semilogx(grid, on_seen, "o-", color=ORANGE, markersize=3, label="tokens of the calibration")
        ax.semilogx(
            grid, [decibels(codes, others) for _, codes in found], "o-", color=BLUE, markersize=3, label="other tokens"
        )
        ax.axhline(nearest, color=GRAY, linestyle=":", label="rounded to nearest")
    left.axvline(gptq.DAMPING, color=GRAY, linewidth=0.8)
    left.set(xlabel="damping, as a share of the mean of the diagonal", ylabel="signal to noise, dB")
    right.set(xlabel="tokens of calibration")
    right.set_xticks(counts, [str(count) for count in counts], minor=False)
    right.minorticks_off()
    left.legend(frameon=False)
    return drawn
