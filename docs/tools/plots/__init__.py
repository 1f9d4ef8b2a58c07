"""The figures of the tutorial, from the functions that it explains; one file for the figures of one subject.

    python -m qgraft.docs.tools.plots               # all of them, into docs/images
    python -m qgraft.docs.tools.plots clipping      # or by name

Random numbers have fixed seeds: the same library draws the same figure.
"""

from pathlib import Path

import matplotlib

from . import (  # noqa: F401  they fill DRAWN
    budget,
    calibration,
    factorization,
    formats,
    foundations,
    gptq,
    low_rank,
    one_layer,
    outliers,
    rotation,
    smoothing,
    speed,
    weights,
)
from .canvas import DRAWN

IMAGES = Path(__file__).parents[2] / "images"


def main(names: list[str], folder: Path = IMAGES) -> None:
    folder.mkdir(exist_ok=True)
    for name in names or DRAWN:
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 9}):
            DRAWN[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})
