"""What `allocate` found: a recipe, what each layer gets, and what other budgets would buy."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..recipes import Recipe
from . import tables


@dataclass(frozen=True)
class Choice:
    """One layer: what it gets, and what that costs. error: its predicted share of the model's error."""

    layer: str
    candidate: str
    bytes: int
    weights: int
    error: float

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Point:
    """Of the curve: the least predicted error under a budget, and how many layers get which candidate."""

    bits: float
    bytes: int
    error: float
    layers: dict[str, int]


@dataclass(frozen=True)
class Allocation:
    """What `allocate` found. `print(allocation)` shows it; `recipe` is an ordinary recipe, ready for the Quantizer.

    choices: the layers in the model's order. curve: from the smallest to the largest budget that makes a difference.
    metric: what `error` and the curve are in, a first-order prediction. bytes: of the whole model afterwards.
    """

    recipe: Recipe
    budget: str
    metric: str
    choices: tuple[Choice, ...]
    curve: tuple[Point, ...]
    bytes: int

    @property
    def bits(self) -> float:
        """Of a weight, on average over the layers; scales, branches and biases are in it."""
        return 8 * sum(c.bytes for c in self.choices) / sum(c.weights for c in self.choices)

    @property
    def error(self) -> float:
        """Predicted, in `metric`."""
        return sum(c.error for c in self.choices)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "budget": self.budget,
            "bits": self.bits,
            "bytes": self.bytes,
            "metric": self.metric,
            "error": self.error,
            "curve": [asdict(point) for point in self.curve],
            "layers": [{**asdict(choice), "bits": choice.bits} for choice in self.choices],
            "recipe": self.recipe.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write the recipe (.yaml, .yml) or everything as JSON (.json)."""
        path = Path(path)
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise ValueError(f"{path}: end it in .yaml for the recipe or in .json for all numbers")
        text = json.dumps(self.to_dict(), indent=1) + "\n" if path.suffix == ".json" else self.recipe.to_yaml()
        path.write_text(text, encoding="utf-8")

    def table(self) -> Table:
        """The curve, with the budget's own line in it."""
        names = list(dict.fromkeys(name for point in self.curve for name in point.layers))
        mine = Point(self.bits, self.bytes, self.error, Counter(c.candidate for c in self.choices))
        table = Table(title=f"What a budget buys; chosen: {self.budget}", caption=f"error: predicted {self.metric}")
        for title in ("bits", "model", "error", *names):
            table.add_column(title, justify="right")
        for point in sorted({p.bytes: p for p in (*self.curve, mine)}.values(), key=lambda p: p.bytes):
            numbers = f"{point.bits:.2f}", tables.size(point.bytes), f"{point.error:.3g}"
            style = "bold" if point.bytes == mine.bytes else None
            table.add_row(*numbers, *(str(point.layers.get(name, 0)) for name in names), style=style)
        return table

    def __str__(self) -> str:
        return tables.to_text(self.table())
