"""A budget in words, and the choice that makes the most of it: one option for each group of layers.

The choice is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger 2004, chapter 11). It is solved
exactly, as an integer program, by HiGHS (Huangfu and Hall 2018) through SciPy.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .errors import QGraftError
from .tables import size

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
FORM = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", re.IGNORECASE)

PRECISION = 1e4  # what the cost of the best choice so far is scaled to: the solver then sees 1e-10 of it


class BudgetError(QGraftError, ValueError):
    """The budget is not one, or none of the choices fits into it."""


@dataclass(frozen=True)
class Budget:
    """bits: the most that a weight may cost on average, or None; bytes: the most for the whole model, or None."""

    text: str
    bits: Fraction | None
    bytes: int | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Option:
    """What a choice costs: bytes, exactly, and an error that adds up over the layers."""

    bytes: int
    error: float


def parse(text: str) -> Budget:
    """ "4.6 bits" (of a weight, on average) or "2.1 GiB" (of the whole model). BudgetError if it is neither."""
    found = FORM.fullmatch(text) if isinstance(text, str) else None
    if found:
        number, unit = Fraction(found[1]), found[2].lower()
        if number > 0 and unit in ("bit", "bits"):
            return Budget(text.strip(), number, None)
        if number > 0 and unit in UNITS:
            return Budget(text.strip(), None, int(number * UNITS[unit]))
    raise BudgetError(f"a budget is written '4.6 bits' or '2.1 GiB' (B, KB, MB, GB, KiB, MiB, GiB), not {text!r}")


def solve(groups: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """The index of one option for each group: at most `limit` bytes in all, and of such choices the least error.

    Exact: no other choice within the limit has a smaller error, beyond what float64 resolves. Raises BudgetError if
    even the smallest options are larger.
    """
    least = sum(min(o.bytes for o in options) for options in groups)
    if least > limit:
        raise BudgetError(f"the least possible is {size(least)} ({least} bytes), {size(limit)} are allowed")
    kept = [_worth_it(options) for options in groups]
    picks = _program([[groups[g][i] for i in indices] for g, indices in enumerate(kept)], limit - least)
    return [kept[g][pick] for g, pick in enumerate(picks)]


def _worth_it(options: Sequence[Option]) -> list[int]:
    """Those that no other beats in both bytes and error, the smallest first. All others can only cost time."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].error)):
        if not kept or options[i].error < options[kept[-1]].error:
            kept.append(i)
    return kept


def _program(groups: list[list[Option]], room: int) -> list[int]:
    """groups: by rising bytes and falling error; room: bytes beyond those of all the smallest.

    The solver's tolerances are absolute (1e-6) and know no units. So what is asked is what an option costs above the
    best of its group, and once a choice is known, the program is asked again with that choice's cost as the unit and
    without the options that alone cost more: until nothing better comes.
    """
    picks = [0] * len(groups)  # the smallest: it fits
    cost = _cost(groups, picks)
    while cost > 0:
        allowed = [[i for i, o in enumerate(group) if o.error - group[-1].error <= cost] for group in groups]
        better = _ask(
            [[group[i] for i in some] for group, some in zip(groups, allowed, strict=True)], groups, room, cost
        )
        better = [some[i] for some, i in zip(allowed, better, strict=True)]
        if (new := _cost(groups, better)) >= cost * (1 - 1e-12):
            break
        picks, cost = better, new
    return picks


def _cost(groups: list[list[Option]], picks: list[int]) -> float:
    return sum(group[i].error - group[-1].error for group, i in zip(groups, picks, strict=True))


def _ask(some: list[list[Option]], groups: list[list[Option]], room: int, unit: float) -> list[int]:
    """One integer program over `some` of the options of `groups`."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    extra = [o.bytes - whole[0].bytes for group, whole in zip(some, groups, strict=True) for o in group]
    worse = np.array([o.error - group[-1].error for group in some for o in group])
    owner = np.repeat(np.arange(len(some)), [len(group) for group in some])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    step = math.gcd(*extra) or 1
    cap = room // step
    while True:
        result = milp(
            worse * (PRECISION / unit),
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array([[x // step for x in extra]], dtype=np.float64), -np.inf, cap),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise RuntimeError(f"the solver gave up: {result.message}")
        marks = np.flatnonzero(result.x > 0.5)
        used = sum(extra[i] for i in marks) // step
        if used <= room // step:
            return [int(i - np.searchsorted(owner, owner[i])) for i in marks]
        cap -= used - room // step  # too much by less than the tolerance: in whole bytes, it must not be
