"""What to do to a model, as YAML that is checked before any work begins. Knows nothing of layers or torch."""

from .errors import RecipeError
from .files import shipped_recipes
from .loader import load_recipe
from .match import pattern_matches
from .schema import CalibrationSpec, Recipe, Rule, SchemeSpec
from .suggest import did_you_mean, suggest

__all__ = [
    "CalibrationSpec",
    "Recipe",
    "RecipeError",
    "Rule",
    "SchemeSpec",
    "did_you_mean",
    "load_recipe",
    "pattern_matches",
    "shipped_recipes",
    "suggest",
]
