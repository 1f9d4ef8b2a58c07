"""``extends``: a recipe that says only what differs from another.

Mappings merge key by key, anything else is replaced. Two keys have their own rule:

- ``rules``: the child's stand before the parent's, because the first rule that matches wins;
- ``scheme``: options are inherited only while the name stays the same, since they mean nothing to another
  scheme. A mapping without a name changes options of the parent's scheme.

``name`` and ``description`` tell of one recipe and are not inherited.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RecipeError, spell_not_text
from .files import locate, read_text
from .node import Node
from .reader import read_yaml

MAX_CHAIN = 16
OWN = ("name", "description")


def resolve(root: Node, chain: tuple[Path, ...] = ()) -> Node:
    """``root`` (a mapping) with the recipes that it extends merged in, and without the key ``extends``.

    ``chain`` holds the files that led here, outermost first. A relative path starts at the folder of
    ``root.source``. Raises RecipeError for a parent that cannot be found or read, a circle, or more than 16
    recipes in a row.
    """
    reference = root.value.get("extends")
    if reference is None:
        return root
    path = _locate(reference)
    seen = [os.path.realpath(file) for file in chain]
    if os.path.realpath(path) in seen:
        circle = chain[seen.index(os.path.realpath(path)) :]
        shown = " -> ".join(str(file) for file in (*circle, path))
        raise RecipeError(f"{reference.place}: extends: goes in a circle: {shown}")
    if len(chain) >= MAX_CHAIN:
        raise RecipeError(f"{reference.place}: extends: more than {MAX_CHAIN} recipes in a row")
    try:
        text = read_text(path)
    except RecipeError as error:
        raise RecipeError(f"{reference.place}: extends: {error}") from None
    parent = resolve(read_yaml(text, str(path)), (*chain, path))

    child = {key: node for key, node in root.value.items() if key != "extends"}
    return Node(_merge_recipes(child, parent.value), root.source, root.line)


def _locate(reference: Node) -> Path:
    if not isinstance(reference.value, str) or not reference.value.strip():
        got = spell_not_text(reference.value)
        raise RecipeError(f"{reference.place}: extends: must be one shipped name or one path, got {got}")
    try:
        return locate(reference.value, Path(reference.source).parent)
    except RecipeError as error:
        raise RecipeError(f"{reference.place}: extends: {error}") from None


def _merge_recipes(child: dict[str, Node], parent: dict[str, Node]) -> dict[str, Node]:
    merged = {key: node for key, node in parent.items() if key not in OWN}
    for key, node in child.items():
        if key not in merged:
            merged[key] = node
        elif key == "rules":
            merged[key] = _merge_rules(node, merged[key])
        elif key == "scheme":
            merged[key] = _merge_schemes(node, merged[key])
        else:
            merged[key] = _merge(node, merged[key])
    return merged


def _merge(child: Node, parent: Node) -> Node:
    if not isinstance(child.value, dict) or not isinstance(parent.value, dict):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        merged[key] = _merge(node, merged[key]) if key in merged else node
    return Node(merged, child.source, child.line)


def _merge_rules(child: Node, parent: Node) -> Node:
    if not isinstance(child.value, list) or not isinstance(parent.value, list):
        return child
    return Node(child.value + parent.value, child.source, child.line)


def _merge_schemes(child: Node, parent: Node) -> Node:
    child, parent = _as_mapping(child), _as_mapping(parent)
    if not isinstance(child.value, dict) or not isinstance(parent.value, dict):
        return child
    if "name" in child.value and "name" in parent.value:
        same = child.value["name"].value == parent.value["name"].value
        return _merge(child, parent) if same else child
    return _merge(child, parent)


def _as_mapping(scheme: Node) -> Node:
    if not isinstance(scheme.value, str):
        return scheme
    return Node({"name": scheme}, scheme.source, scheme.line)
