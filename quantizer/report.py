"""What happened to each layer: error, size, time. Rides on the layers, so a copy or a pickle keeps it."""

import json
import math
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import QuantLayer, Stats, storage_bytes
from . import tables
from .details import layer_details, rank_of, won
from .kinds import shape_of

# A norm below this counts as zero in a ratio.
TINY = 1e-15


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    weight_error: |W - W_dequantized| / |W|, Frobenius norms. output_sqnr: 10 log10(|y|^2 / |y - y_q|^2) in dB
    on a sample of calibration tokens, activation quantization included; None without data, or where the
    output overflows. tokens: how many calibration tokens the layer saw. seconds: time to quantize it.
    rank: of the low-rank branch or of the factors, if there are any. smooth_alpha: the share of the outliers of
    activations that was moved into the weight. won: what each ingredient is worth, in dB of the output's error, and
    details: what layer_details() recorded, both where that was asked for.
    """

    name: str
    scheme: str
    in_features: int
    out_features: int
    weight_error: float
    output_sqnr: float | None
    bytes_before: int
    bytes_after: int
    tokens: int
    seconds: float
    rank: int | None = None
    smooth_alpha: float | None = None
    won: dict[str, float] | None = None
    details: dict[str, Any] | None = None


ROWS = TypeAdapter(tuple[LayerReport, ...])


@dataclass(frozen=True)
class Report:
    """The layers that were quantized, in the model's order. `print(report)` shows a table."""

    layers: tuple[LayerReport, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Report":
        """Collect the reports that the quantized layers of a model carry."""
        found = (m.report for m in model.modules() if isinstance(m, QuantLayer))
        return cls(tuple(r for r in found if isinstance(r, LayerReport)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """The inverse of `to_dict`; pydantic's ValidationError for entries of a wrong type."""
        return cls(ROWS.validate_python(data["layers"]))

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "layers": [asdict(row) for row in self.layers]}

    def save(self, path: str | Path) -> None:
        """Write JSON, one line a layer."""
        rows = ",\n".join(json.dumps(asdict(row)) for row in self.layers)
        Path(path).write_text(f'{{"version": 1, "layers": [\n{rows}\n]}}\n', encoding="utf-8")

    def save_html(self, path: str | Path, model: nn.Module | None = None) -> None:
        """Write one self-contained HTML page (extra `report`).

        model: the quantized model, for the bytes of what is not quantized and the options of each layer.
        """
        from .html.data import from_report
        from .html.page import write

        write([from_report(self, model=model)], path)

    def table(self, every: bool = False) -> Table:
        """A rich table; layers that differ only in numbers stand in one line (mean errors) unless `every`."""
        return tables.report_table(self, every)

    def summary(self) -> str:
        before, after = (sum(getattr(r, a) for r in self.layers) for a in ("bytes_before", "bytes_after"))
        if not self.layers:
            return "no layer was quantized"
        # With data, weights are chosen for the error of the output; that of the weights may then be large for good.
        seen = [r for r in self.layers if r.output_sqnr is not None]
        if seen:
            worst = min(seen, key=lambda r: r.output_sqnr)
            how = f"lowest output SQNR {worst.output_sqnr:.1f} dB"
        else:
            worst = max(self.layers, key=lambda r: r.weight_error)
            how = f"largest weight error {100 * worst.weight_error:.2f} %"
        ratio = f", {before / after:.2f}x" if after else ""
        return (
            f"{tables.count(len(self.layers), 'layer')}: {tables.size(before)} -> {tables.size(after)}{ratio}, "
            f"{sum(r.seconds for r in self.layers):.1f} s; {how} in {worst.name or 'the model'}"
        )

    def plot(self, path: str | Path) -> None:
        """Draw error and SQNR per layer into a PNG or SVG file (extra `report`)."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("report.plot() needs matplotlib: pip install 'qgraft[report]'") from None
        measured = [r.output_sqnr is not None for r in self.layers]
        figure = Figure(figsize=(9, 5 if any(measured) else 3), layout="constrained")
        axes = figure.subplots(2 if any(measured) else 1, 1, sharex=True, squeeze=False)[:, 0]
        index = range(len(self.layers))
        axes[0].bar(index, [100 * r.weight_error for r in self.layers])
        axes[0].set_ylabel("weight error, %")
        if any(measured):
            axes[1].bar(index, [r.output_sqnr or 0 for r in self.layers], color="tab:green")
            axes[1].set_ylabel("output SQNR, dB")
        axes[-1].set_xlabel("quantized layer, in the model's order")
        figure.savefig(path)

    def notes(self) -> list[str]:
        """What there is to say about the report as a whole, such as that there was no calibration data."""
        from .html.advice import notes_on

        return notes_on([vars(row) for row in self.layers])

    def __str__(self) -> str:
        notes = (textwrap.fill(note, tables.text_width()) for note in self.notes())
        return "\n".join([tables.to_text(self.table()), *notes])


def measure(
    name: str,
    linear: nn.Module,
    layer: QuantLayer,
    stats: Stats | None,
    bytes_before: int,
    seconds: float,
    details: bool = False,
) -> LayerReport:
    """Compare a quantized layer with the float one (an `nn.Linear` or `nn.Embedding`) that it came from."""
    n, k = shape_of(layer)
    weight = linear.weight.detach().float()
    norm, error = _norm(weight), _norm(layer.dequantize() - weight)
    return LayerReport(
        name=name,
        scheme=layer.scheme_name,
        in_features=k,
        out_features=n,
        weight_error=error / norm if norm else 0.0,
        output_sqnr=None if stats is None else _sqnr(linear, layer, stats.sample),
        bytes_before=bytes_before,
        bytes_after=storage_bytes(layer),
        tokens=0 if stats is None else stats.tokens,
        seconds=seconds,
        rank=rank_of(layer) or None,
        smooth_alpha=getattr(layer, "chosen_alpha", None),
        won=won(weight, layer, stats) if details else None,
        details=layer_details(weight, layer, stats) if details else None,
    )


def _norm(x: Tensor) -> float:
    # Summed in float64: the square of a large float32 weight is infinite.
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


@torch.no_grad()
def _sqnr(linear: nn.Linear, layer: QuantLayer, sample: Tensor) -> float | None:
    bias = None if linear.bias is None else linear.bias.detach().float()
    exact = F.linear(sample, linear.weight.detach().float(), bias)
    signal, noise = _norm(exact), _norm(layer(sample.to(layer.dtype)).float() - exact)
    if not math.isfinite(signal) or not math.isfinite(noise):
        return None  # the output is too large for the layer's type
    if not noise:
        signal = max(signal, 1.0)  # an output of zeros that stays so has lost nothing
    return 20 * math.log10(max(signal, TINY) / max(noise, TINY))
