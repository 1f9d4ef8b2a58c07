"""qgraft: model surgery for PyTorch. Quantize the linear layers of any model by a recipe.

from qgraft import Quantizer
model = Quantizer(model).quantize("w4a4_svd")
"""

from . import functional
from .layers import (
    BitLinear,
    BitNetLinear,
    EmbeddingW4,
    EmbeddingW8,
    FactorizedLinear,
    FactorizedW8Linear,
    QuantLinear,
    SVDQW4A4Linear,
    SVDQW4A8Linear,
    W4A16Linear,
    W4GroupLinear,
    W8A8Linear,
    W8A8StaticLinear,
    W8A16Linear,
    W8A32Linear,
    W8GroupLinear,
)
from .quantizer import Plan, Quantizer, Report
from .quantizer.allocate import Allocation, allocate
from .quantizer.checkpoint import save
from .quantizer.interop.clients import register as _register
from .quantizer.interop.export import export
from .quantizer.loading import load
from .quantizer.parallel import parallelize
from .quantizer.streaming import quantize_files
from .recipes import Recipe, RecipeError, load_recipe, shipped_recipes

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "BitLinear",
    "BitNetLinear",
    "EmbeddingW4",
    "EmbeddingW8",
    "FactorizedLinear",
    "FactorizedW8Linear",
    "Plan",
    "QuantLinear",
    "Quantizer",
    "Recipe",
    "RecipeError",
    "Report",
    "SVDQW4A4Linear",
    "SVDQW4A8Linear",
    "W4A16Linear",
    "W4GroupLinear",
    "W8A8Linear",
    "W8A8StaticLinear",
    "W8A16Linear",
    "W8A32Linear",
    "W8GroupLinear",
    "allocate",
    "export",
    "functional",
    "load",
    "load_recipe",
    "parallelize",
    "quantize_files",
    "save",
    "shipped_recipes",
]

_register()


def __getattr__(name: str) -> object:
    if name == "QGraftConfig":  # importing it imports transformers
        from .quantizer.interop.transformers_config import QGraftConfig

        return QGraftConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
