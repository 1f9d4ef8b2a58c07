"""From what a user types to a Recipe."""

from __future__ import annotations

import os
from pathlib import Path

from .extends import resolve
from .files import locate, read_text
from .reader import read_yaml
from .schema import Recipe


def load_recipe(source: Recipe | str | os.PathLike[str]) -> Recipe:
    """The recipe that ``source`` means.

    A Recipe is returned as it is. A string is a shipped name (``"w8a16"``) or else a path: it ends in .yaml
    or .yml, holds a separator or exists. A recipe without a name takes that of its file. Raises RecipeError
    with every fault of the recipe, and TypeError for a source of another type.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, str):
        path = locate(source)
    elif isinstance(source, os.PathLike):
        path = Path(source)
    else:
        raise TypeError(
            f"a recipe is a Recipe, a name or a path, got {type(source).__name__}; "
            "Recipe.from_dict and Recipe.from_yaml read data and text"
        )
    tree = read_yaml(read_text(path), str(path))
    return Recipe._from_tree(resolve(tree, (path,)), name=path.stem)
