"""The demo's results as tables: for a terminal or a log of 100 columns, and as markdown for a page."""

from typing import Any

from rich import box
from rich.table import Table

NOTE = (
    "Sizes are of the whole model, embeddings included. 'smaller', 'against float' and what is in brackets: "
    "compared with the float model of the same type, timed in turn in the same run; more than 1x is faster. "
    "'reload exact': saved and loaded into a fresh model, outputs are equal to the last bit."
)


def header(result: dict[str, Any]) -> list[str]:
    change = ["against float"] if _has_change(result) else []
    speeds = [f"{name} tok/s" for name in result["rows"][0]["speeds"]]
    return ["model", "size", "smaller", "made in", result["quality"], *change, *speeds, "reload exact"]


def cells(result: dict[str, Any]) -> list[list[str]]:
    """One list of texts a row, in the order of `header`."""
    base = {row["name"]: row for row in result["rows"] if not row["recipe"]}
    lines = []
    for row in result["rows"]:
        float_row = base[row["dtype"]]
        is_float = row is float_row
        line = [
            row["name"],
            f"{row['bytes'] / 2**20:.0f} MiB",
            "" if is_float else f"{float_row['bytes'] / row['bytes']:.2f}x",
            "" if is_float else f"{_short(row['seconds'])} s",
            result["quality_format"].format(row["quality"]),
        ]
        if _has_change(result):
            line.append("" if is_float else f"{row['quality'] / float_row['quality']:.3f}x")
        for speed in row["speeds"].values():
            line.append(_short(speed["tokens_per_s"]) + ("" if is_float else f" ({speed['ratio']:.2f}x)"))
        line.append("" if is_float else "yes" if row["reload_equal"] else "NO")
        lines.append(line)
    return lines


def rich_table(name: str, result: dict[str, Any]) -> Table:
    table = Table(title=name, caption=NOTE, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for i, title in enumerate(header(result)):
        # A title of two words takes two lines: 100 columns are not many.
        table.add_column(title.replace(" ", "\n", 1), justify="right" if i else "left", no_wrap=True)
    for row, line in zip(result["rows"], cells(result), strict=True):
        if not row["recipe"] and row is not result["rows"][0]:
            table.add_section()
        table.add_row(*line)
    return table


def markdown(results: dict[str, Any], machine: str) -> str:
    """The same tables, the samples and the claims as a markdown page."""
    parts = [f"`{results['command']}` on {machine}."]
    for name, result in results["models"].items():
        titles = header(result)
        rule = ["---", *["---:"] * (len(titles) - 1)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *cells(result)))
        parts += [f"### {name}", result["setting"], table]
        samples = [f"- `{row['name']}`: {row['sample']}" for row in result["rows"] if row["sample"]]
        if samples:
            parts += [f'"{result["prompt"]}"', "\n".join(samples)]
    verdict = {True: "ok", False: "**FAILED**"}
    claims = [f"- {verdict[claim['ok']]}: {claim['text']}: {claim['measured']}" for claim in results["claims"]]
    return "\n\n".join([*parts, NOTE, "\n".join(claims)]) + "\n"


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def _has_change(result: dict[str, Any]) -> bool:
    # 1 - cosine is a comparison with the float model already.
    return result["quality"] == "perplexity"
