"""Nearest names, for "did you mean": keys of a recipe, shipped names, module names of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

CUTOFF = 0.6
# A word that agrees with the end of a name is nearly as good as one that agrees with all of it.
TAIL_WEIGHT, LAST_WEIGHT = 0.98, 0.9


def suggest(word: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The at most ``n`` names of ``known`` nearest to ``word``, best first; empty when none is near.

    Upper and lower case are the same. Dotted names are also compared by their last components, so
    ``*.dwn_proj`` finds ``model.layers.0.mlp.down_proj``; glob and regex characters of ``word`` are ignored.
    Names that differ only in a block number (``layers.0.fc``, ``layers.1.fc``) count as one, and the nearest
    of them is given. Raises nothing.
    """
    wanted = _clean(word)
    if not wanted:
        return []
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(known):
        alike.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", name), []).append(name)

    score = _scorer(wanted)
    scored = [(score(names[0].casefold()), names) for names in alike.values()]
    near = [names for value, names in sorted(scored, key=lambda pair: -pair[0]) if value >= CUTOFF]
    return [max(names, key=lambda name: score(name.casefold())) for names in near[: max(n, 0)]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the end of a message, or ``""`` when nothing is near."""
    nearest = suggest(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _clean(word: str) -> str:
    word = re.sub(r"[*?\[\]^$\\()|+]", "", word.casefold().removeprefix("re:"))
    return re.sub(r"\.{2,}", ".", word).strip(".")


def _scorer(wanted: str):
    depth = wanted.count(".") + 1
    # SequenceMatcher prepares its second sequence, so the word stands there and the names pass by.
    whole, last = SequenceMatcher(autojunk=False), SequenceMatcher(autojunk=False)
    whole.set_seq2(wanted)
    last.set_seq2(wanted.rpartition(".")[2])

    def ratio(matcher: SequenceMatcher, name: str) -> float:
        matcher.set_seq1(name)
        return matcher.ratio() if matcher.real_quick_ratio() >= CUTOFF else 0.0

    def score(name: str) -> float:
        parts = name.split(".")
        best = ratio(whole, name)
        if len(parts) > depth:
            best = max(best, TAIL_WEIGHT * ratio(whole, ".".join(parts[-depth:])))
        if len(parts) > 1 or depth > 1:
            best = max(best, LAST_WEIGHT * ratio(last, parts[-1]))
        return best

    return score
