"""The one error of this package, and how it words places and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# A file can hold a hundred thousand faults. Nobody reads past the first page.
MAX_PROBLEMS = 50


def first_page(problems: list[str], found: int | None = None) -> list[str]:
    """At most 50 problems, and how many more there are of the ``found`` ones (default: all)."""
    more = (len(problems) if found is None else found) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"and {more} more"] if more > 0 else problems


class RecipeError(ValueError):
    """A recipe that cannot be used. ``problems`` holds every fault that was found, ``str()`` one a line."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def dotted(path: Iterable[str | int]) -> str:
    """``("rules", 0, "match", 1)`` -> ``"rules[0].match[1]"``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def spell(value: Any) -> str:
    """A value of a recipe in the words of YAML, short enough for one line of a message."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge number"  # Python refuses to print one of some thousand digits
    if isinstance(value, (str, int, float)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:56]} ..."
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"a Python {type(value).__name__}"


def spell_not_text(value: Any) -> str:
    """``spell`` where text was wanted: YAML reads some bare words as other types, so say the way out."""
    if isinstance(value, bool):
        return f"{spell(value)}: YAML reads a bare yes, no, on or off as true or false; put it in quotes"
    if isinstance(value, (int, float)):
        return f"{spell(value)}: YAML reads it as a number; put it in quotes"
    return spell(value)
