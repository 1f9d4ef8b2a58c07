"""YAML text -> a tree of Nodes.

Only the plain part of YAML is read: mappings with text keys, lists, text, numbers, true, false and null.
Anchors, aliases, merge keys and tags are refused: ``extends`` does their work in a way that can be followed
by eye, and without them a small file cannot grow into a large tree.
"""

from __future__ import annotations

import yaml

from .errors import RecipeError, first_page, spell
from .node import MAX_DEPTH, Node

MAX_BYTES = 1 << 20
# Python parses a long number in quadratic time, and no recipe has one.
MAX_NUMBER = 64

TAG = "tag:yaml.org,2002:"
NUMBERS = (TAG + "int", TAG + "float")
BLOCKS = ("while parsing a block collection", "while parsing a block mapping")
STAR_HINT = 'a pattern that starts with * must be in quotes: "*.name"'


def read_yaml(text: str, source: str) -> Node:
    """The one document of ``text`` as a tree; its root is a mapping. ``source`` names it in messages.

    Raises RecipeError with ``source`` and line for everything that is not plain YAML with unique text keys.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{source}: larger than {MAX_BYTES // 1024} KiB, which no recipe needs")
    try:
        return _read(text, source)
    except RecipeError:
        raise
    except _Refused as error:
        raise RecipeError(f"{source}:{error.problem_mark.line + 1}: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise RecipeError(f"{source}:{line}: the character U+{code:04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        hint = ""
        if error.context == "while scanning an alias":
            hint = f"; {STAR_HINT}"
        elif "'\\t'" in str(error.problem):
            hint = "; indent with spaces, not tabs"
        elif error.context in BLOCKS:
            hint = "; is it indented like the lines above it?"
        raise RecipeError(f"{source}{line}: not valid YAML: {error.problem}{context}{hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets a few faults of escapes and directives through as bare Python errors.
        raise RecipeError(f"{source}: not valid YAML: {error}") from None


def _read(text: str, source: str) -> Node:
    loader = _Loader(text)
    root = loader.get_node() if loader.check_node() else None
    if root is not None and loader.check_node():
        line = loader.peek_event().start_mark.line + 1
        raise RecipeError(f"{source}:{line}: a second document begins; a recipe is one document")
    if root is None or root.tag == TAG + "null":
        raise RecipeError(f"{source}: empty; a recipe needs at least 'scheme' or 'rules'")
    if not isinstance(root, yaml.MappingNode):
        got = "a list" if isinstance(root, yaml.SequenceNode) else spell(root.value)
        raise RecipeError(f"{source}:{_line(root)}: a recipe is a mapping of keys to values, got {got}")
    problems: list[str] = []
    tree = _convert(root, _line(root), source, loader, problems)
    if problems:
        raise RecipeError(first_page(problems))
    return tree


class _Loader(yaml.SafeLoader):
    """SafeLoader that stops at the first event of the part of YAML that recipes do without."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(event, f"aliases (*{event.anchor}) are not read; {STAR_HINT}")
        if event.anchor is not None:
            raise _Refused(event, f"anchors (&{event.anchor}) are not read; write it out, or use 'extends'")
        if event.tag is not None:
            raise _Refused(event, f"tags ({event.tag}) are not read; put text in quotes")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(event, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is not read here."""

    def __init__(self, event: yaml.Event, problem: str):
        super().__init__(problem=problem, problem_mark=event.start_mark)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _convert(node: yaml.Node, line: int, source: str, loader: _Loader, problems: list[str]) -> Node:
    """``line`` is the line of the key for a value of a mapping: that is where the eye looks for it."""
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, _line(item), source, loader, problems) for item in node.value]
        return Node(items, source, line)
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, source, loader, problems), source, line)

    children: dict[str, Node] = {}
    for key_node, value_node in node.value:
        here = _line(key_node)
        key = _key(key_node, f"{source}:{here}", problems)
        if key is None:
            continue
        if key in children:
            problems.append(
                f"{source}:{here}: the key {spell(key)} stands on line {children[key].line} and again on line {here}"
            )
            continue
        children[key] = _convert(value_node, here, source, loader, problems)
    return Node(children, source, line)


def _key(node: yaml.Node, place: str, problems: list[str]) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        problems.append(f"{place}: a key must be text, not a list or a mapping")
    elif node.tag == TAG + "merge":
        problems.append(f"{place}: merge keys (<<) are not read; use 'extends'")
    elif node.tag in (*NUMBERS, TAG + "bool", TAG + "null"):
        problems.append(f"{place}: a key must be text; put {spell(node.value)} in quotes")
    else:
        return node.value
    return None


def _scalar(node: yaml.ScalarNode, source: str, loader: _Loader, problems: list[str]):
    # Dates and the other types of YAML 1.1 stay the text that was written.
    if node.tag not in (*NUMBERS, TAG + "bool", TAG + "null"):
        return node.value
    if len(node.value) <= MAX_NUMBER:
        try:
            return loader.construct_object(node)
        except (ValueError, OverflowError):
            pass
    number = spell(node.value)
    problems.append(f"{source}:{_line(node)}: cannot read the number {number}; text goes in quotes")
    return None
