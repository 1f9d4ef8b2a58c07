"""Rows for the figures, from the rows of a report."""

from typing import Any

from .data import ROOT, Row, Shown

MIB = 1 << 20


def layers(shown: Shown, measure: str) -> list[Row]:
    """For `figures.layers`; without the layers that have no such number."""
    scale = 100 if measure == "weight_error" else 1
    return [
        {
            "index": i + 1,
            "name": row["name"] or ROOT,
            "scheme": row["scheme"],
            "flagged": bool(items),
            measure: scale * row[measure],
        }
        for i, (row, items) in enumerate(zip(shown.rows, shown.advice, strict=True))
        if row.get(measure) is not None
    ]


def histogram(counts: dict[str, Any]) -> list[Row]:
    """For `figures.histogram`, from what `details` recorded."""
    rows = []
    for which in ("before", "after"):
        bins = counts[which]
        if bins is None:
            continue
        step, total = (counts["high"] - counts["low"]) / len(bins), max(1, sum(bins))
        for i, count in enumerate(bins):
            start = counts["low"] + i * step
            rows.append({"from": start, "to": start + step, "share": 100 * count / total, "which": which})
    return rows


def spectrum(found: dict[str, Any]) -> list[Row]:
    """For `figures.spectrum`; a logarithmic axis has no place for zeros."""
    rank = found["rank"]
    return [
        {"index": i, "value": v, "rank": rank, "kept": "in the branch" if i <= rank else "left for the codes"}
        for i, v in enumerate(found["values"], 1)
        if v > 0
    ]


def tradeoff(reports: list[Shown]) -> list[Row]:
    """For `figures.tradeoff`, a row a report."""
    return [
        {"name": s.name, "mib": s.after / MIB, "weight_error": 100 * s.weight_error, "output_sqnr": s.sqnr}
        for s in reports
        if s.weight_error is not None
    ]


def tradeoff_measure(reports: list[Shown]) -> str:
    """The error of outputs, where activations count too, if all reports have it."""
    return "output_sqnr" if all(s.sqnr is not None for s in reports) else "weight_error"


def compare(a: Shown, b: Shown) -> tuple[str, list[Row]]:
    """A measure that both reports have, and the rows for `figures.compare`, two for each layer that is in both.

    It is the error of outputs if there is any: between 4 and 8 bits for activations, weights see no difference.
    """
    there = {row["name"]: row for row in b.rows}
    for measure, scale in (("output_sqnr", 1), ("weight_error", 100)):
        found = [
            {"index": i, "name": r["name"] or ROOT, "report": shown.name, "value": scale * row[measure]}
            for i, r in enumerate(a.rows, 1)
            if r.get(measure) and there.get(r["name"], {}).get(measure)
            for shown, row in ((a, r), (b, there[r["name"]]))
        ]
        if found:
            break
    return measure, found
