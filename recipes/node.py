"""A recipe as a tree in which every value knows its file and line.

Positions travel with the values, so that after ``extends`` a message still points into the file that the
faulty value was written in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError, dotted, spell

# A recipe needs four levels. The cap is for files that were made to exhaust the reader.
MAX_DEPTH = 16

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Node:
    """``value`` is a dict of str -> Node, a list of Node, or a scalar."""

    value: Any
    source: str
    line: int | None = None

    @property
    def place(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def plain(self) -> Any:
        """The tree as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def places(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
        """Every path of the tree with the place it was written at, parents first."""
        yield path, self.place
        children: Any = ()
        if isinstance(self.value, dict):
            children = self.value.items()
        elif isinstance(self.value, list):
            children = enumerate(self.value)
        for key, child in children:
            yield from child.places((*path, key))


def nearest(places: Mapping[KeyPath, str], path: KeyPath) -> KeyPath | None:
    """``path``, or the nearest path above it, that ``places`` knows; None when it does not know the root."""
    for end in range(len(path), -1, -1):
        if path[:end] in places:
            return path[:end]
    return None


def from_plain(value: Any, source: str, path: KeyPath = ()) -> Node:
    """A tree of Nodes from dicts, lists, tuples and scalars, which are copied and not kept.

    Raises RecipeError for a key that is not text and for nesting deeper than 16 levels.
    """
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"{source}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                prefix = f"{dotted(path)}: " if path else ""
                raise RecipeError(f"{source}: {prefix}a key must be text, got {spell(key)}")
        children = {key: from_plain(child, source, (*path, key)) for key, child in value.items()}
        return Node(children, source)
    if isinstance(value, (list, tuple)):
        return Node([from_plain(child, source, (*path, i)) for i, child in enumerate(value)], source)
    return Node(value, source)
