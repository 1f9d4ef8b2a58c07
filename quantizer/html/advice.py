"""Which layers to look at, and what to do about each, in words and as a rule for the recipe.

A layer stands out against the others of its scheme by the robust z-score of Iglewicz and Hoaglin (1993): the distance
from the median in units of 1.4826 times the median absolute deviation.
"""

import math
import re
import statistics
from dataclasses import dataclass
from typing import Any

import yaml

from ...layers import EMBEDDINGS, SCHEMES
from ...recipes.match import REGEX
from ..tables import collapse, count, size

Row = dict[str, Any]

# Beyond this many robust standard deviations from the median a layer stands out, if it is also worse by the factor.
FAR = 3.5
WORSE_ERROR = 1.3
WORSE_DECIBEL = 4.0
# Fewer layers have no median to speak of.
ENOUGH = 6
# Below this share of error a layer is fine, however much it stands out; 34 dB is the same as a ratio of outputs.
HARMLESS_ERROR, HARMLESS_SQNR = 0.02, 34.0
# At 10 dB the error is a third of the output's size.
LOW_SQNR = 10.0
SAVES_TOO_LITTLE = 0.9
# Beyond this share of the result it is what was not quantized that makes it large.
MUCH_LEFT = 0.3
# Of that, norms and biases are not what makes it large.
WORTH_NAMING = 0.05
# What a branch may have: more and it costs what the 4 bits have saved.
MOST_RANK = 256

FOUR_BITS = ("w4a4_svd", "w4a8_svd", "w4a16")
ROUNDS_INPUT = ("w4a4_svd", "w4a8_svd", "w8a8", "w8a8_static")
# Schemes that data makes no better.
NO_DATA = ("w8a16", "w8a32", "bitnet")
BLIND = (
    ", and schemes that learn from data worked from the weights alone. Quantize with data like the model's own "
    "(calibration=..., on the command line --calibration)."
)
# A table of vectors; the embedders of diffusion models are linear layers.
EMBEDDING_NAME = re.compile(r"(embed(?!der)|wte)[^.]*$")
WEIGHT_ERROR, OUTPUT_ERROR = "weight error stands out", "output error stands out"


@dataclass(frozen=True)
class Advice:
    """What is wrong with a layer, what to do, and the rule of a recipe that does it ("" where a rule cannot)."""

    what: str
    do: str
    rule: str = ""


def advise(rows: list[Row]) -> list[list[Advice]]:
    """For each row of a report what there is to say about it; most rows have nothing."""
    errors, sqnrs = _spread(rows, "weight_error", math.log), _spread(rows, "output_sqnr", lambda x: x)
    return [_of(row, errors.get(row["scheme"]), sqnrs.get(row["scheme"])) for row in rows]


def notes_on(rows: list[Row]) -> list[str]:
    """What there is to say about a report as a whole."""
    linear = [row for row in rows if row["scheme"] not in EMBEDDINGS]
    found = []
    blind = [row for row in linear if not row.get("tokens")]
    if linear and len(blind) == len(linear):
        found.append(
            "No calibration data was given, so the error of the outputs is not known"
            + ("." if all(row["scheme"] in NO_DATA for row in linear) else BLIND)
        )
    elif blind:
        found.append(f"The calibration data did not reach {count(len(blind), 'layer')}: {_some(blind)}.")
    few = [r for r in linear if 0 < r.get("tokens", 0) < r["in_features"] and r["scheme"] not in NO_DATA]
    if few:
        found.append(
            f"{count(len(few), 'layer')} saw fewer tokens than they have input features ({_some(few)}): statistics "
            "of so few are noisy. More calibration data makes them better."
        )
    return found


def notes_on_rest(modules: list[Row]) -> list[str]:
    """What there is to say about the modules of a whole model that stayed as they were: {"name", "scheme", "after"}."""
    rest = [m for m in modules if m["scheme"] is None]
    left, whole = sum(m["after"] for m in rest), sum(m["after"] for m in modules)
    if not whole or left < MUCH_LEFT * whole:
        return []
    alike = collapse((m["name"] or "the model itself", (), (m["after"],)) for m in rest)
    large = sorted((each for each in alike if each[2][0] > WORTH_NAMING * left), key=lambda each: -each[2][0])[:3]
    text = f"{size(left)} of the {size(whole)} ({100 * left / whole:.0f} %) are not quantized: "
    text += ", ".join(f"{name} ({size(sums[0])})" for name, _, sums in large)
    text += ", and others." if len(large) < len(alike) else "."
    if any(EMBEDDING_NAME.search(name.lower()) for name, *_ in large):
        text += " A rule with `scheme: embedding_w8` makes an embedding four times smaller than float32."
    return [text + " `qgraft plan` says why each layer stays."]


def _of(row: Row, errors: tuple[float, float] | None, sqnrs: tuple[float, float] | None) -> list[Advice]:
    found = []
    error, sqnr = row.get("weight_error"), row.get("output_sqnr")
    bad_weight = bad_output = False
    # With data, weights are chosen for the error of the output; where that is small, theirs does no harm.
    fine = sqnr is not None and sqnr >= HARMLESS_SQNR
    if error and error > HARMLESS_ERROR and errors and not fine:
        median, deviation = errors
        far = math.log(error) - median
        bad_weight = far > FAR * deviation and far > math.log(WORSE_ERROR)
        if bad_weight:
            what = f"{WEIGHT_ERROR}: {100 * error:.2f} %, where the median of {row['scheme']} is "
            found.append(Advice(what + f"{100 * math.exp(median):.2f} %", *_more_bits_for_weights(row)))
    if sqnr is not None and not fine and sqnrs:
        median, deviation = sqnrs
        bad_output = median - sqnr > max(FAR * deviation, WORSE_DECIBEL)
        if bad_output and not bad_weight:
            what = f"{OUTPUT_ERROR}: {sqnr:.1f} dB, where the median of {row['scheme']} is {median:.1f} dB"
            found.append(Advice(what, *_for_output(row)))
    if sqnr is not None and sqnr < LOW_SQNR and not (bad_output or bad_weight):
        share = 100 * 10 ** (-sqnr / 20)
        what = f"low output SQNR: {sqnr:.1f} dB, so the error is {share:.0f} % of the output's size"
        found.append(Advice(what, *_for_output(row)))
    if sqnr is None and row.get("tokens") and row["scheme"] not in EMBEDDINGS:
        what = "the output overflows the layer's type on the calibration data, so it has no SQNR"
        found.append(Advice(what, "Run the model in bfloat16 or float32; float16 ends at 65504."))
    before, after = row.get("bytes_before"), row.get("bytes_after")
    if before and after and after > SAVES_TOO_LITTLE * before:
        what = f"saves little: {100 * after / before:.0f} % of its bytes are left"
        found.append(Advice(what, *_skip(row, "it hardly gets smaller")))
    return found


def _more_bits_for_weights(row: Row) -> tuple[str, str]:
    rank = (row.get("options") or {}).get("rank")
    room = min(row["in_features"], row["out_features"]) // 4
    if rank and 2 * rank <= min(MOST_RANK, room) and row["scheme"] in FOUR_BITS:
        return (
            f"Raise the rank of its branch from {rank} to {2 * rank}; if that is not enough, give it 8 bits (w8a16).",
            _rule(row, {"scheme": {"name": row["scheme"], **_chosen(row), "rank": 2 * rank}}),
        )
    if row["scheme"] in FOUR_BITS:
        return "Give it 8 bits: w8a16.", _rule(row, {"scheme": "w8a16"})
    return _skip(row, "it loses too much")


def _chosen(row: Row) -> Row:
    """The options that are not the scheme's defaults: a rule starts from the defaults again."""
    fields = SCHEMES[row["scheme"]].Scheme.model_fields if row["scheme"] in SCHEMES else {}
    return {k: v for k, v in row["options"].items() if k in fields and v != fields[k].default}


def _for_output(row: Row) -> tuple[str, str]:
    scheme = row["scheme"]
    blind = "" if row.get("tokens") else " Calibrate with data first."
    if scheme == "w4a4_svd":
        return (
            "Its inputs are what 4 bits do not hold: give them 8 bits (w4a8_svd)." + blind,
            _rule(row, {"scheme": "w4a8_svd"}),
        )
    if scheme == "w8a8_static":
        return "Give each token a scale of its own: w8a8.", _rule(row, {"scheme": "w8a8"})
    if scheme in ROUNDS_INPUT:
        return "Leave its inputs in 16 bits: w8a16.", _rule(row, {"scheme": "w8a16"})
    return _more_bits_for_weights(row)


def _skip(row: Row, reason: str) -> tuple[str, str]:
    return f"Leave it in float: {reason}.", _rule(row, {"skip": reason})


def _rule(row: Row, what: dict[str, Any]) -> str:
    """One rule as YAML, to paste under `rules:`; "" for the root, which has no name to match."""
    if not row["name"]:
        return ""
    # A name may begin as a regex does.
    pattern = REGEX + re.escape(row["name"]) if row["name"].startswith(REGEX) else row["name"]
    return yaml.safe_dump([{"match": [pattern], **what}], sort_keys=False, default_flow_style=None, width=1000)


def _spread(rows: list[Row], field: str, scale) -> dict[str, tuple[float, float]]:
    """Median and robust standard deviation by scheme."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(field)
        if value is not None and (scale is not math.log or value > 0):
            values.setdefault(row["scheme"], []).append(scale(value))
    spread = {}
    for scheme, found in values.items():
        if len(found) >= ENOUGH:
            median = statistics.median(found)
            spread[scheme] = median, 1.4826 * statistics.median(abs(v - median) for v in found)
    return spread


def _some(rows: list[Row]) -> str:
    return ", ".join(row["name"] or "(the model)" for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
