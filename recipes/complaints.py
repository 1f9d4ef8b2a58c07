"""pydantic's errors in the words of someone who edits a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pydantic import ValidationError

from .errors import MAX_PROBLEMS, dotted, first_page, spell, spell_not_text
from .node import KeyPath, nearest
from .suggest import did_you_mean


def complaints(
    error: ValidationError, places: Mapping[KeyPath, str], known: Callable[[KeyPath], Iterable[str]]
) -> list[str]:
    """One line for each fault, in the order of the file: ``file:line: path: what is wrong``.

    places: where each path was written, in that order; it knows at least the root, ``()``. known(path): the
    keys that the mapping at a path may have.
    """
    order = {path: i for i, path in enumerate(places)}
    faults = [(nearest(places, _path(fault["loc"])), fault) for fault in error.errors(include_url=False)]
    faults.sort(key=lambda pair: order[pair[0]])
    if _is_something_else(places, faults, known):
        return [f"{places[()]}: is no recipe: it has none of a recipe's keys ({', '.join(known(()))})"]
    lines = []
    for written, fault in faults[:MAX_PROBLEMS]:
        about, message = _word(fault, _path(fault["loc"]), known)
        prefix = f"{places[written]}: {dotted(about)}" if about else places[written]
        lines.append(f"{prefix}: {message}")
    return first_page(lines, len(faults))


def _is_something_else(
    places: Mapping[KeyPath, str], faults: list[tuple[KeyPath, dict]], known: Callable[[KeyPath], Iterable[str]]
) -> bool:
    """Whether of several keys at the top none is one of a recipe, nor nearly one."""
    keys = {str(path[0]) for path in places if len(path) == 1}
    extra = [fault["loc"] for _, fault in faults if fault["type"] == "extra_forbidden"]
    unknown = {str(loc[0]) for loc in extra if len(loc) == 1}
    return len(keys) > 1 and keys == unknown and not any(did_you_mean(key, known(())) for key in keys)


def _path(loc: tuple[str | int, ...]) -> KeyPath:
    """The model keeps a scheme's options in a dict of their own; in YAML they stand beside its name."""
    for at in range(1, len(loc)):
        if loc[at] == "options" and loc[at - 1] == "scheme":
            return loc[:at] + loc[at + 1 :]
    return loc


def _word(fault: dict, path: KeyPath, known: Callable[[KeyPath], Iterable[str]]) -> tuple[KeyPath, str]:
    """The path that the message speaks of, and the message."""
    kind, got = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        parent, key = path[:-1], str(path[-1])
        keys = list(known(parent))
        hint = "" if key == "options" else did_you_mean(key, keys)
        if not hint and "scheme" in keys:
            option = "rank: 64" if key == "options" else f"{key}: ..."
            hint = f"; options of a scheme stand inside it, as in scheme: {{name: ..., {option}}}"
        return parent, f"unknown key {spell(key)}{hint} (known: {', '.join(keys)})"
    if kind == "missing":
        return path[:-1], f"{path[-1]!r} is missing"
    if kind in ("int_type", "greater_than_equal"):
        return path, f"must be a whole number >= 1, got {spell(got)}"
    if kind == "less_than_equal":
        return path, "is far too large"
    if kind == "string_type":
        return path, f"must be text, got {spell_not_text(got)}"
    if kind == "bool_type":
        return path, f"must be true or false, got {spell(got)}"
    if kind == "tuple_type":
        if path[-1] == "match":
            return path, f"must be a pattern or a list of patterns, got {spell_not_text(got)}"
        return path, f"must be a list, got {spell(got)}"
    if kind == "model_type":
        return path, f"must be a mapping of keys to values, got {spell(got)}"
    if kind == "value_error":
        return path, str(fault["ctx"]["error"])
    return path, fault["msg"]
