"""Details of the weights of a model that was quantized without recording them, from the float model beside it."""

from pathlib import Path

from torch import nn

from ...layers import QuantLayer
from ..details import weight_details
from ..errors import CheckpointError
from ..interop.huggingface import ModelFolder
from ..kinds import float_weight, shape_of
from ..surgery import split_experts
from .data import ROOT, Shown


def read_details(shown: Shown, folder: Path, original: Path) -> None:
    """Load both models, and compare them layer by layer."""
    float_model, model = ModelFolder(original).load(), ModelFolder(folder).load_quantized()
    fill_details(shown, float_model, model, str(original))


def fill_details(shown: Shown, float_model: nn.Module, model: nn.Module, name: str = "the float model") -> None:
    """Put histograms and singular values into the rows that have none; what was recorded stays.

    Raises CheckpointError if a quantized layer has no float layer of its name and shape.
    """
    float_model = split_experts(float_model, shown.names)
    there = dict(float_model.named_modules(remove_duplicate=False))
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantLayer)}
    for row in shown.rows:
        layer, twin = layers.get(row["name"]), there.get(row["name"])
        if layer is None:
            raise CheckpointError(f"{shown.name}: the report has a layer '{row['name'] or ROOT}', the model has not")
        if twin is None or getattr(twin, "weight", None) is None or shape_of(twin) != shape_of(layer):
            raise CheckpointError(f"{name}: has no layer '{row['name'] or ROOT}' of this shape: not made from that")
        if not row.get("details"):
            row["details"] = {**weight_details(float_weight(twin), layer), "input": None}
