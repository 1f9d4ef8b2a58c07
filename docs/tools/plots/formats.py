"""Where a file of others keeps what."""

import torch
from matplotlib.figure import Figure

from qgraft.kernels import nunchaku_layout as layout

from .canvas import figure, panels


@figure
def nunchaku_tiles() -> Figure:
    """Which lane of a warp loads which codes of a weight, and how far into the file they are."""
    n, k = layout.TILE, layout.TILE
    code = torch.arange(n * k)
    # int4 codes cannot carry a position, so that it goes through in pieces of four bits.
    pieces = [layout.untile_codes(_packed((code >> shift & 15) - 8, n)).long() + 8 for shift in (0, 4, 8, 12)]
    position = sum(piece << shift for piece, shift in zip(pieces, (0, 4, 8, 12), strict=True))  # in the file, of [n, k]
    drawn, (left, right) = panels(2, 3.2, sharey=True, sharex=True)
    lane = position // 32 % 32  # a load is 16 bytes, 32 codes
    for ax, values, colors, title in (
        (left, lane, "twilight", "lane of the warp"),
        (right, position / 2 / 1024, "viridis", "place in the file, KiB"),
    ):
        shown = ax.imshow(values[:32, :64], cmap=colors, interpolation="nearest", aspect="auto")
        drawn.colorbar(shown, ax=ax)
        ax.set(title=title, xlabel="input feature")
    left.set_ylabel("output feature")
    return drawn


def _packed(codes: torch.Tensor, n: int) -> torch.Tensor:
    """int4 codes in the order of the file -> the file's qweight (N, K // 2) int8."""
    low, high = (codes & 15).reshape(n, -1, 2).unbind(-1)
    return (low | high << 4).to(torch.uint8).view(torch.int8)
