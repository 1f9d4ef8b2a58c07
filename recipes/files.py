"""Recipes on disk: those that ship with the package, and those of the user."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RecipeError, spell
from .reader import MAX_BYTES
from .suggest import suggest

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package: name -> file, in the order of the names."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def locate(reference: str, folder: Path = Path()) -> Path:
    """The file that ``reference`` means: a shipped name, or a path relative to ``folder``.

    A shipped name comes first, so that an output folder called ``w8a16`` does not hide the recipe. Raises
    RecipeError when it is neither; whether the file can be read is not checked here.
    """
    shipped = shipped_recipes()
    if reference in shipped:
        return shipped[reference]
    if not _can_be_a_path(reference):
        raise RecipeError(f"{spell(reference)} is neither a shipped recipe nor a path")
    is_path = reference.endswith(SUFFIXES) or "/" in reference or os.sep in reference
    if is_path or (reference and os.path.exists(folder / reference)):
        return folder / reference
    names = suggest(reference, shipped)
    hint = f"did you mean {' or '.join(map(repr, names))}?" if names else f"there are {', '.join(shipped)}."
    raise RecipeError(f"no shipped recipe is called {reference!r}; {hint} Or give a path to a .yaml file")


def _can_be_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises RecipeError, which begins with the path, when there is none."""
    # A pipe or a device would block or never end, so only a regular file is opened.
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder; give the .yaml file in it" if os.path.isdir(path) else "not a regular file"
        raise RecipeError(f"{path}: is {what}")
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        names = suggest(path.stem, shipped_recipes(), n=1)
        hint = f"; did you mean the shipped recipe {names[0]!r}?" if names else ""
        raise RecipeError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES // 1024} KiB, which no recipe needs")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
