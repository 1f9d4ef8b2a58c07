"""One self-contained page: the table as HTML, the rest as JSON, Vega and a script of our own. Nothing is fetched."""

import json
import math
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..tables import size
from . import figures, rows
from .data import KNOWN, ROOT, Row, Shown, top, tree
from .drawing import converter

MOST_ADVICE = 8
# Title, and whether it is a number: those sort from the largest first.
COLUMNS = [
    ("layer", False),
    ("scheme", False),
    ("shape", True),
    ("weight error", True),
    ("output SQNR", True),
    ("before", True),
    ("after", True),
]
# What the other report has beside a column, while two are compared.
COMPARED = {"weight error": "error, other", "output SQNR": "SQNR, other"}


def write(reports: list[Shown], path: str | Path) -> None:
    """Write the page as UTF-8. ImportError, in words, without the extra `report`."""
    Path(path).write_text(render(reports), encoding="utf-8")


def render(reports: list[Shown]) -> str:
    """The page as text; the first report is the one shown, the others can be chosen and compared with."""
    from markupsafe import Markup

    extra = list(dict.fromkeys(name for shown in reports for name in shown.extra))
    return _template().render(
        reports=reports,
        compared=COMPARED,
        columns=COLUMNS + [(name.replace("_", " "), True) for name in extra],
        extra=extra,
        root=ROOT,
        most_advice=MOST_ADVICE,
        version=_version(),
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
        vega=Markup(_vega()),
        data=Markup(to_json(_data(reports))),
    )


def _data(reports: list[Shown]) -> dict[str, Any]:
    return {
        "root": ROOT,
        "specs": {
            "error": figures.layers("weight_error"),
            "sqnr": figures.layers("output_sqnr"),
            "weights": figures.histogram("weights"),
            "activations": figures.histogram("activations"),
            "spectrum": figures.spectrum(),
            "compare": {measure: figures.compare(measure) for measure in figures.MEASURES},
            "tradeoff": figures.tradeoff(rows.tradeoff_measure(reports)),
        },
        "tradeoff": rows.tradeoff(reports),
        "reports": [_report(shown) for shown in reports],
    }


def _report(shown: Shown) -> dict[str, Any]:
    nodes = tree(shown.modules)
    return {
        "name": shown.name,
        "after": shown.after,
        "flagged": bool(shown.flagged),
        "rows": [_row(shown, i) for i in range(len(shown.rows))],
        "error": rows.layers(shown, "weight_error"),
        "sqnr": rows.layers(shown, "output_sqnr"),
        "tree": nodes,
        "top": top(nodes),
        "spec": figures.tree(shown.schemes),
    }


def _row(shown: Shown, index: int) -> Row:
    row = shown.rows[index]
    known = {key: value for key, value in row.items() if key in KNOWN}
    extra = {key: value for key, value in row.items() if key not in KNOWN and value is not None}
    return {**known, "extra": extra, "advice": [vars(item) for item in shown.advice[index]]}


def to_json(value: Any) -> str:
    """JSON for a <script> element: no name in it can end the element, and what is not finite is null."""
    text = json.dumps(_finite(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _vega() -> str:
    return converter().javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(f"reports in HTML need the extra 'report' ({error}): pip install 'qgraft[report]'") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        size=size, percent=percent, decibel=decibel, plain=_plain, breakable=breakable, as_share=as_share, code=_code
    )
    return environment.from_string(_file("page.html.j2"))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def breakable(name: str) -> Any:
    """A name that a line may end in after each dot or underscore, escaped."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[._])", name))


def _code(text: str) -> Any:
    """Text with `code` in backticks, escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def as_share(decibels: float) -> str:
    """The error beside the output that an SQNR stands for: 20 dB are 10 %."""
    return f"{100 * 10 ** (-decibels / 20):.2g} %"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value) if isinstance(value, (str, bool)) else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _version() -> str:
    from ... import __version__

    return __version__
