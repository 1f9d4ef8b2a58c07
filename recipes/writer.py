"""Dicts, lists and scalars -> YAML text that ``reader`` gives back as they were."""

from __future__ import annotations

from typing import Any

import yaml

# PyYAML writes these line breaks of Unicode as they are, and reads them back as "\n"; in double quotes it
# escapes them.
FOREIGN_BREAKS = "\x85\u2028\u2029"


def write_yaml(data: dict[str, Any]) -> str:
    """``data`` as one block of YAML, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in FOREIGN_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
