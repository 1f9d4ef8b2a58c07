"""Which modules a pattern means.

A pattern is read in one of two ways, and nothing else:

- ``re:`` and a Python regex: the regex must match the *whole* dotted name, so ``re:.*layers\\.1`` does not
  reach into ``layers.10``;
- anything else: the exact dotted name, or the exact class name, or a shell glob over the whole dotted name,
  where ``*`` also crosses dots.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from functools import lru_cache

from .errors import RecipeError, spell

MAX_PATTERN = 512
REGEX = "re:"


def pattern_matches(pattern: str, name: str, class_name: str) -> bool:
    """Whether ``pattern`` means the module with the dotted ``name`` and the class ``class_name``.

    Raises RecipeError for a pattern that ``compile_pattern`` refuses.
    """
    return compile_pattern(pattern)(name, class_name)


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Callable[[str, str], bool]:
    """A pattern as a function of (dotted name, class name).

    Raises RecipeError for a pattern that is empty, longer than 512 characters or not a valid regex.
    """
    if not pattern.strip() or pattern.strip() == REGEX:
        raise RecipeError(f'the pattern {pattern!r} is empty; write "*" to mean every layer')
    if len(pattern) > MAX_PATTERN:
        raise RecipeError(
            f"the pattern {spell(pattern)} has {len(pattern)} characters, the most is {MAX_PATTERN}; "
            "give several patterns instead"
        )
    is_regex = pattern.startswith(REGEX)
    try:
        compiled = re.compile(pattern.removeprefix(REGEX) if is_regex else fnmatch.translate(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        glob = pattern.removeprefix(REGEX).startswith("*")
        hint = f"; a shell glob goes without {REGEX!r}" if is_regex and glob else ""
        raise RecipeError(f"the pattern {pattern!r} is not a valid regex: {error}{hint}") from None

    if is_regex:
        return lambda name, class_name: compiled.fullmatch(name) is not None
    return lambda name, class_name: (
        pattern in (name, class_name) or compiled.match(name) is not None  # exact first: it may hold a [
    )
