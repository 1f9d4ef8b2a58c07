"""Who takes part in the accuracy benchmark: our recipes, their ablations, other libraries, and float types.

An entrant is written as on the command line: a shipped recipe or a recipe's file, with options of its scheme behind
it where they are to differ ("w4a4_svd rank=64 rotate=false"); a peer by its library and scheme ("hqq 4 bit").
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import qgraft
from qgraft.layers import SCHEMES, QuantLinear, storage_bytes
from qgraft.recipes import Recipe, RecipeError, load_recipe, shipped_recipes

from . import memory, models, peers
from .peers import LIMIT_8, Peer

Batches = list[dict[str, Tensor]]

# Ternary weights ruin every model that was not trained with them, and none here was.
NOT_FOR_THESE = ("bitnet",)
# Each takes one ingredient away, or gives more of one.
ABLATIONS = (
    *(f"w4a4_svd {option}" for option in (
        "sequential=false", "rotate=false", "smooth=none", "smooth_alpha=0.5", "rounding=rtn", "rank=0", "rank=64",
        "scales=group", "svd=exact", "iterations=0", "rotation_signs=none",
        "zero_point=false", "act_zero_point=false",
        "rotate=false smooth=none rounding=rtn rank=0 zero_point=false act_zero_point=false sequential=false")),
    *(f"w4a8_svd {option}" for option in (
        "sequential=false", "rotate=false", "smooth=none", "rounding=rtn", "rank=0", "rank=64", "iterations=0",
        "rotation_signs=none", "zero_point=false")),
    *(f"w4a16 {option}" for option in (
        "sequential=false", "rotate=false", "rounding=rtn", "rank=32", "zero_point=true",
        "rotate=false rounding=rtn sequential=false")),
    "w8a8 rotate=false smooth=none", "w8a8 smooth=none",
)  # fmt: skip


ALL = 1_000_000  # sequences of calibration

# With float32 input these fall to code that takes minutes for 512 tokens.
IN_BFLOAT16 = ("torchao int4wo",)


@dataclass(frozen=True)
class Made:
    """A quantized model and what it costs. bits: of a weight of the layers that were quantized, with their scales
    and branches and without their biases."""

    model: nn.Module
    bits: float
    model_bytes: int


class Entrant(ABC):
    """Something that makes a float32 model smaller. It may consume the model that it gets."""

    library: str
    name: str
    calibrated = False

    @abstractmethod
    def make(self, model: nn.Module, calibration: Batches) -> Made:
        """Raises whatever the library raises."""

    def absent(self) -> str | None:
        """Why it cannot be tried at all, or None."""
        return None


class Ours(Entrant):
    """A recipe of ours. Raises RecipeError, in words for the user, on a name or option that there is not."""

    library = "qgraft"

    def __init__(self, text: str):
        self.name = text
        self.recipe = recipe(text)
        self.calibrated = any(SCHEMES[name].needs for name in _schemes(self.recipe) if name in SCHEMES)

    def make(self, model: nn.Module, calibration: Batches) -> Made:
        # All of it, as the other libraries take it: a recipe's own limit counts sequences, and these may be short.
        spec = self.recipe.calibration.model_copy(update={"samples": ALL})
        recipe = self.recipe.model_copy(update={"calibration": spec})
        model = qgraft.Quantizer(model).quantize(recipe, calibration=calibration or None, progress=False)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        size = sum(storage_bytes(layer) - _bias_bytes(layer) for layer in layers)
        return Made(model, 8 * size / max(weights, 1), storage_bytes(model))


class Theirs(Entrant):
    """A peer, in each layer that our recipe of the same width quantizes."""

    def __init__(self, peer: Peer):
        self.library, self.name, self.peer = peer.library, peer.name, peer

    def absent(self) -> str | None:
        return self.peer.absent("cpu")

    def make(self, model: nn.Module, calibration: Batches) -> Made:
        names = covered(model, "w8a16" if self.peer.limit == LIMIT_8 else "w4a16")
        if self.name in IN_BFLOAT16:
            model = HalfFloat(torch.bfloat16).make(model, calibration).model
            names = [f"model.{name}" for name in names] if isinstance(model, _Cast) else names
        weights = size = 0
        for name in names:
            linear = model.get_submodule(name)
            layer = self.peer.build(linear)
            weights += linear.weight.numel()
            size += memory.tensor_bytes(layer) - _bias_bytes(linear)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
        return Made(model, 8 * size / weights, memory.tensor_bytes(model))


class HalfFloat(Entrant):
    """The whole model in another float type: what 16 bits lose without any quantization."""

    library = "torch"

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.name = dtype, str(dtype).removeprefix("torch.")

    def make(self, model: nn.Module, calibration: Batches) -> Made:
        # A language model is made anew, because of its rotary frequencies; others cannot be made by their config alone.
        generates = hasattr(model, "can_generate") and model.can_generate()
        model = models.in_dtype(model, self.dtype) if generates else _Cast(model, self.dtype)
        return Made(model, 8.0 * self.dtype.itemsize, storage_bytes(model))


class _Cast(nn.Module):
    """A model in another type that takes and gives float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, **batch: Any) -> Any:
        return self.model(**{k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()})


def recipe(text: str) -> Recipe:
    """The recipe that "NAME option=value ..." means; the options replace those of the recipe's scheme, and
    sequential=false that of its calibration."""
    name, *options = text.split()
    found = load_recipe(name)
    if not options:
        return found
    changes, calibration = {}, found.calibration.model_dump()
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals or found.scheme is None:
            raise RecipeError(f"'{text}': options are written key=value, behind a recipe that has a scheme")
        (calibration if key == "sequential" else changes)[key] = yaml.safe_load(value)
    scheme = {"name": found.scheme.name, **found.scheme.options, **changes}
    changed = {"name": text, "scheme": scheme, "calibration": calibration}
    return Recipe.from_dict({**found.to_dict(), **changed}, source=f"'{text}'")


def _schemes(recipe: Recipe) -> set[str]:
    return {scheme.name for scheme in (recipe.scheme, *(rule.scheme for rule in recipe.rules)) if scheme is not None}


def covered(model: nn.Module, recipe: str) -> list[str]:
    """The names of the layers that a recipe quantizes: peers get the same ones."""
    return [layer.name for layer in qgraft.Quantizer(model).plan(recipe).todo]


def ours(only: Iterable[str] | None = None, ablations: bool = False) -> list[Entrant]:
    """Those named; by default all shipped recipes, and on demand the ablations."""
    if only is None:
        only = [name for name in shipped_recipes() if name not in NOT_FOR_THESE]
    return [Ours(text) for text in (*only, *(ABLATIONS if ablations else ()))]


def theirs(only: list[str] | None = None) -> list[Entrant]:
    """Other libraries, as peers.chosen() understands them. What is only compiled, or for a GPU, is another speed of
    the same numbers."""
    from .llm_compressor import LLMCompressor

    extra = {entrant.library: entrant for entrant in (HalfFloat(torch.bfloat16), LLMCompressor())}
    named = [] if only is None else [name for name in only if name not in extra]
    chosen = peers.chosen(None if only is None else named or ["none"])
    chosen = [p for p in chosen if "cpu" in p.devices and "compiled" not in p.scheme]
    return [*(e for library, e in extra.items() if only is None or library in only), *map(Theirs, chosen)]


def _bias_bytes(layer: nn.Module) -> int:
    bias = getattr(layer, "bias", None)
    return bias.numel() * bias.element_size() if isinstance(bias, Tensor) else 0
