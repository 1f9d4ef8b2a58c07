"""What the figures share: colours, axes, bars, and the list of all of them."""

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure

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


def bars(values: dict[str, float], colors: list[str], label: str, height: float, form: str = "%.1f %%") -> Figure:
    """A bar for each value, with its number behind it."""
    drawn, ax = panels(1, height)
    ax.bar_label(ax.barh(list(values), list(values.values()), color=colors), fmt=form, padding=4)
    ax.invert_yaxis()
    ax.set(xlabel=label)
    return drawn


def relative(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    return ((approximation - exact).norm() / exact.norm()).item()
