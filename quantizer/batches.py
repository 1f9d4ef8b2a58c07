"""Calibration data in batches: taken from whatever it comes in, cut, moved, and given to a model."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..recipes import CalibrationSpec
from .errors import CalibrationError

Batch = Any  # a tensor, a mapping of keyword arguments, or a tuple of positional ones


def as_batches(data: Any, spec: CalibrationSpec, tokenizer: Any) -> Iterable[Batch]:
    """The data, texts as token ids. Raises CalibrationError for what is no data, and for texts without a tokenizer."""
    if isinstance(data, str):
        data = [data]
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"cannot calibrate with a {type(data).__name__}: give a list of tensors, mappings or texts, a "
            "DataLoader, or a function that runs the model"
        )
    return (_tokenize(b, spec, tokenizer) if isinstance(b, str) else b for b in data)


def _tokenize(text: str, spec: CalibrationSpec, tokenizer: Any) -> Batch:
    if tokenizer is None:
        raise CalibrationError("calibration texts need a tokenizer: quantize(..., tokenizer=tokenizer)")
    return dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=spec.tokens))


def take(batches: Iterable[Batch], spec: CalibrationSpec) -> list[Batch]:
    """As much of it as the recipe says."""
    taken, tokens = [], spec.samples * spec.tokens
    for batch in batches:
        each = 1 if _rows_are_tokens(batch) else spec.tokens
        left = tokens // each
        if left < 1:
            break
        sizes = [t.shape[0] for t in tensors_of(batch) if t.ndim]
        size = max(sizes, default=1)
        if len({*sizes} - {1}) > 1:
            size = sizes[0]
        elif size > left:
            batch = _cut(batch, size, left)
        taken.append(batch)
        tokens -= max(1, size) * each
    return taken


def _rows_are_tokens(batch: Batch) -> bool:
    """Whether all of it is features by rows, as a perceptron takes them: without a dimension for the sequence."""
    tensors = tensors_of(batch)
    return bool(tensors) and all(t.ndim == 2 and t.is_floating_point() for t in tensors)


def _cut(batch: Batch, size: int, left: int) -> Batch:
    return map_tensors(batch, lambda t: t[:left] if t.ndim and len(t) == size else t)


def tensors_of(batch: Batch) -> list[Tensor]:
    """All of them, however deep."""
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, see)
    return found


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its tensors changed, those in nested mappings, lists, tuples and dataclasses too."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        new = copy.copy(batch)  # not replace(): it leaves out what is no field of __init__
        for field in dataclasses.fields(batch):
            object.__setattr__(new, field.name, map_tensors(getattr(batch, field.name), change))
        return new
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def run_on(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def describe(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(f"{k}: {describe(v)}" for k, v in batch.items())
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {batch.dtype}".replace("torch.", "")
    if isinstance(batch, (tuple, list)):
        return ", ".join(map(describe, batch))
    return type(batch).__name__
