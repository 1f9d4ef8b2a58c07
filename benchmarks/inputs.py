"""A linear layer of the sentence encoder all-MiniLM-L6-v2, and what goes into it when it reads news.

For looking at one ingredient of quantization on real numbers, which show what random ones hide: outliers, features
that hang together, weights with a few strong directions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import models

BATCH = 8  # documents
LENGTH = 128  # tokens of each, at most


@cache
def inputs(name: str, documents: int = 16) -> tuple[nn.Linear, Tensor, Tensor]:
    """The layer of that name, such as "encoder.layer.0.output.dense", without its bias, which no rounding touches; and
    its inputs x (tokens, K) float32, twice: of `documents` documents to calibrate with, and of as many others to
    measure on.

    Raises models.MissingModels if the packages with weights and text are not installed.
    """
    model, tokenizer = _minilm()
    linear = model.get_submodule(name)
    parts = (models.news(part)[:documents] for part in (models.CALIBRATION, models.EVALUATION))
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    return plain, *(_seen(linear, model, tokenizer, texts) for texts in parts)


class _Enough(Exception):
    """What comes after the layer need not be computed."""


@torch.no_grad()
def _seen(linear: nn.Linear, model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0][mask])
        raise _Enough

    hook = linear.register_forward_pre_hook(look)
    for start in range(0, len(texts), BATCH):
        options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        batch = tokenizer(texts[start : start + BATCH], **options)
        mask = batch["attention_mask"].bool()  # padding is no token
        try:
            model(**batch)
        except _Enough:
            continue
    hook.remove()
    return torch.cat(seen)


@cache
def _minilm() -> tuple[nn.Module, Any]:
    return models.minilm()
