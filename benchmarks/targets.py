"""What the layers are meant to reach, as data, and what became of it in a run.

Each target is one number for some schemes, numbers of tokens and one weight shape. A verdict is never a matter of
taste: it compares with a number that stands in the same rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number of a row: how to get it, and how to write it."""

    of: Callable[[Row, Sequence[Row]], float | None]
    text: str
    at_most: bool = False  # else at least

    def holds(self, value: float, limit: float) -> bool:
        return value <= limit if self.at_most else value >= limit


@dataclass(frozen=True)
class Target:
    """label: what it is about. limits: number of tokens -> number to reach. measure: a key of MEASURES."""

    label: str
    schemes: tuple[str, ...]
    dtype: str
    shape: tuple[int, int]
    limits: dict[int, float]
    measure: str


@dataclass(frozen=True)
class Verdict:
    """One number against its limit. value None: not measured in this run."""

    target: Target
    scheme: str
    tokens: int
    limit: float
    value: float | None

    @property
    def ok(self) -> bool | None:
        return None if self.value is None else MEASURES[self.target.measure].holds(self.value, self.limit)

    @property
    def word(self) -> str:
        return {True: "reached", False: "missed", None: "not measured"}[self.ok]

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target.label,
            "scheme": self.scheme,
            "dtype": self.target.dtype,
            "shape": list(self.target.shape),
            "tokens": self.tokens,
            "measure": self.target.measure,
            "limit": self.limit,
            "value": self.value,
            "verdict": self.word,
        }


def _key(name: str) -> Callable[[Row, Sequence[Row]], float | None]:
    return lambda row, rows: row.get(name)


def _against(library: str, scheme: str, dtype: str | None = None) -> Callable[[Row, Sequence[Row]], float | None]:
    """Time of another row of the same shape and tokens / time of this one."""

    def ratio(row: Row, rows: Sequence[Row]) -> float | None:
        for other in rows:
            same = all(other[key] == row[key] for key in ("shape", "tokens"))
            named = (other["library"], other["scheme"]) == (library, scheme)
            if same and named and other["dtype"] == (dtype or row["dtype"]) and "median_ms" in other:
                return other["median_ms"] / row["median_ms"] if "median_ms" in row else None
        return None

    return ratio


MEASURES = {
    "ratio": Measure(_key("ratio"), "{:.2f}x F.linear"),
    "error": Measure(_key("error_formula"), "error {:.0e}", at_most=True),
    "roof_share": Measure(_key("roof_share"), "{:.0%} of the roof"),
    "gemlite W8": Measure(_against("gemlite", "A16W8"), "{:.2f}x gemlite"),
    "gemlite W4": Measure(_against("gemlite", "A16W4"), "{:.2f}x gemlite"),
    "bfloat16": Measure(_against("torch", "F.linear", "bfloat16"), "{:.2f}x F.linear bf16"),
    "host_us": Measure(_key("host_us"), "{:.0f} us on the host", at_most=True),
}

_CPU, _GPU = (4096, 4096), (8192, 8192)
_DECODE, _PREFILL, _LONG = (1, 4, 16), (1024, 4096), (2048, 4096)


def _all(tokens: Sequence[int], limit: float) -> dict[int, float]:
    return dict.fromkeys(tokens, limit)


def _each(*limits: float) -> dict[int, float]:
    return dict(zip(CPU_TOKENS, limits, strict=True))


CPU_TOKENS = (1, 4, 16, 64, 256, 1024)
_W4 = ("w4a4_svd", "w4a8_svd")
CPU = (
    Target("W8A32", ("w8a32",), "float32", _CPU, _each(2.5, 3, 2.5, 1.2, 0.9, 0.9), "ratio"),
    Target("W8A32 error", ("w8a32",), "float32", _CPU, _all(CPU_TOKENS, 5e-4), "error"),
    Target("W8A16", ("w8a16",), "bfloat16", _CPU, _each(2.5, 3, 3, 3, 3, 3), "ratio"),
    Target("W4-SVD", _W4, "float32", _CPU, _each(2, 3, 2.5, 1.5, 1.2, 1.2), "ratio"),
)  # fmt: skip

_W4_DECODE = ("w4a16", "w4a8_svd", "w4a4_svd")
CUDA = (
    Target("W8A16 decode", ("w8a16",), "bfloat16", _GPU, _all(_DECODE, 0.80), "roof_share"),
    Target("W8A16 decode", ("w8a16",), "bfloat16", _GPU, _all(_DECODE, 1.7), "bfloat16"),
    Target("W8A16 decode", ("w8a16",), "bfloat16", _GPU, _all(_DECODE, 1.1), "gemlite W8"),
    Target("W4 decode", _W4_DECODE, "bfloat16", _GPU, _all(_DECODE, 0.75), "roof_share"),
    Target("W4 decode", _W4_DECODE, "bfloat16", _GPU, _all(_DECODE, 2.7), "bfloat16"),
    Target("W4 decode", _W4_DECODE, "bfloat16", _GPU, _all(_DECODE, 1.5), "gemlite W4"),
    Target("W4-SVD prefill", _W4, "bfloat16", _GPU, _all(_LONG, 1.3), "bfloat16"),
    Target("W8A8 prefill", ("w8a8",), "bfloat16", _GPU, _all(_LONG, 1.5), "bfloat16"),
    Target("W8A16 prefill", ("w8a16",), "bfloat16", _GPU, _all(_PREFILL, 0.95), "bfloat16"),
    Target("W8A32 prefill", ("w8a32",), "float32", _GPU, _all(_PREFILL, 3), "ratio"),
    Target("W8A32 error", ("w8a32",), "float32", _GPU, _all(_PREFILL, 2e-6), "error"),
    Target("host cost", ("w8a16", "w4a16", "w8a8", "w4a8_svd"), "bfloat16", _GPU, {1: 15}, "host_us"),
)
BY_DEVICE = {"cpu": CPU, "cuda": CUDA}
# On top of its own target, no layer may be slower than this times F.linear, with any number of tokens.
FLOOR = {"cpu": 0.9}


def judge(rows: Sequence[Row], device: str) -> list[Verdict]:
    """A verdict for each limit of each target whose scheme and shape appear in the rows."""
    verdicts = [
        Verdict(target, scheme, tokens, limit, _value(target, scheme, tokens, rows))
        for target in BY_DEVICE[device]
        for scheme in target.schemes
        if any(row["scheme"] == scheme and tuple(row["shape"]) == target.shape for row in rows)
        for tokens, limit in target.limits.items()
    ]
    return verdicts + list(_floors(rows, FLOOR.get(device)))


def _value(target: Target, scheme: str, tokens: int, rows: Sequence[Row]) -> float | None:
    wanted = ("qgraft", scheme, target.dtype, target.shape, tokens)
    for row in rows:
        if (row["library"], row["scheme"], row["dtype"], tuple(row["shape"]), row["tokens"]) == wanted:
            # A wrong answer has an error to be judged by, but no speed.
            return MEASURES[target.measure].of(row, rows) if row["ok"] or target.measure == "error" else None
    return None


def _floors(rows: Sequence[Row], floor: float | None) -> Iterator[Verdict]:
    if floor is None:
        return
    targets: dict[tuple, Target] = {}
    for row in rows:
        if row["library"] == "qgraft" and "ratio" in row:
            key = (row["scheme"], row["dtype"], tuple(row["shape"]))
            target = targets.setdefault(key, Target("never slower", (row["scheme"],), *key[1:], {}, "ratio"))
            yield Verdict(target, row["scheme"], row["tokens"], floor, row["ratio"])
