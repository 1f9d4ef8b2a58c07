"""The `quantization_config` of a transformers model: a recipe for one to be quantized, or what was done to one."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ...recipes import Recipe, load_recipe
from ..checkpoint import check_config

METHOD = "qgraft"


class QGraftConfig(QuantizationConfigMixin):
    """What to do, for `from_pretrained(model, quantization_config=QGraftConfig("w4a8_svd"))`, or what was done.

    recipe: a shipped name, the path of a YAML file, a Recipe, or a dict of the same form.
    modules_to_not_convert: modules to leave in float, by full name or its last parts; also all that is inside them.
    recorded: instead of a recipe, what config.json of a quantized model says.
    Raises RecipeError for a wrong recipe, CheckpointError for a wrong record.
    """

    def __init__(
        self,
        recipe: str | Path | Recipe | Mapping[str, Any] | None = None,
        *,
        modules_to_not_convert: Iterable[str] | None = None,
        **recorded: Any,
    ):
        recorded.pop("quant_method", None)
        self.quant_method = METHOD
        if recipe is None and not recorded:
            raise TypeError("QGraftConfig wants a recipe, such as QGraftConfig('w4a8_svd')")
        if recipe is None:
            self.__dict__.update(check_config({"quant_method": METHOD, **recorded}, "quantization_config"))
        elif recorded:
            raise TypeError(
                f"QGraftConfig takes a recipe or what was recorded of a model, not both: {sorted(recorded)}"
            )
        else:
            if isinstance(modules_to_not_convert, str):
                raise TypeError("modules_to_not_convert is a list of names, not one name")
            self.recipe = recipe.to_dict() if isinstance(recipe, Recipe) else recipe
            self.recipe = str(recipe) if isinstance(recipe, Path) else self.recipe
            self.modules_to_not_convert = list(modules_to_not_convert or ())
            self.read_recipe()

    @property
    def is_record(self) -> bool:
        """Whether it says what was done, and not what to do."""
        return "layers" in self.__dict__

    def read_recipe(self) -> Recipe:
        """The recipe, with a rule that skips `modules_to_not_convert` before all others."""
        recipe = Recipe.from_dict(self.recipe) if isinstance(self.recipe, Mapping) else load_recipe(self.recipe)
        if not self.modules_to_not_convert:
            return recipe
        match = [p for name in self.modules_to_not_convert for p in (name, f"{name}.*", f"*.{name}", f"*.{name}.*")]
        rule = {"match": match, "skip": "in modules_to_not_convert", "optional": True}
        data = recipe.to_dict()
        return Recipe.from_dict({**data, "rules": [rule, *data["rules"]]})

    def record(self) -> dict[str, Any]:
        """What was done, in the form of config.json."""
        return copy.deepcopy(self.__dict__)
