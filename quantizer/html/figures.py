"""The figures, once: Vega specifications that a browser draws in the page and vl-convert draws into files.

Each has its data apart, under the name "table": the page gives it the rows of the layer that was chosen.
https://vega.github.io/vega-lite/docs/ and, for the tree, https://vega.github.io/vega/docs/
"""

from typing import Any

from .data import FLOAT, ROOT

Spec = dict[str, Any]

# The hues of Okabe and Ito (2008), told apart by colour-blind readers too; darker, for 3:1 on white (WCAG 1.4.11).
COLOURS = ["#0072B2", "#C47900", "#00875F", "#B85C8E", "#3A8FC4", "#D55E00", "#8A7E00", "#757575"]
FLOAT_COLOUR = "#8C8C8C"
BEFORE, AFTER = "#8C8C8C", "#0072B2"
MEASURES = {
    "weight_error": ("weight error, %", "Weight error of each layer: the distance of the weights, relative."),
    "output_sqnr": ("output SQNR, dB", "Signal to noise of each layer's output on calibration data; more is better."),
}
# A layer has a number, and no half.
IN_ORDER = {
    "field": "index",
    "type": "quantitative",
    "title": "layer, in the model's order",
    "scale": {"zero": False, "nice": False, "padding": 10},
    "axis": {"tickMinStep": 1, "format": "d", "grid": False, "labelOverlap": "greedy"},
}
CONFIG = {
    "font": "system-ui, sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "gridColor": "#ddd"},
    "legend": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "orient": "top",
        "labelLimit": 320,
    },
}


def layers(measure: str) -> Spec:
    """Rows {"index", "name", "scheme", "flagged", <measure>}; the error in percent."""
    title, description = MEASURES[measure]
    return _lite(
        description,
        mark={"type": "point", "filled": True, "opacity": 0.9, "cursor": "pointer"},
        encoding={
            "x": IN_ORDER,
            "y": {"field": measure, "type": "quantitative", "title": title, "scale": _from_zero(measure)},
            "color": _by_scheme(),
            "size": {"condition": {"test": "datum.flagged", "value": 110}, "value": 30},
            "shape": {
                "condition": {"test": "datum.flagged", "value": "diamond"},
                "value": "circle",
            },
            "tooltip": [
                {"field": "name", "title": "layer"},
                {"field": "scheme"},
                {"field": measure, "title": title, "format": ".3~f"},
            ],
        },
    )


def histogram(what: str) -> Spec:
    """Rows {"from", "to", "share", "which"}, "which" being "before" or "after"; the share in percent."""
    value = {
        "field": "from",
        "type": "quantitative",
        "title": what,
        "scale": {"zero": False, "nice": False},
        "axis": {"tickCount": 5, "format": "~r", "labelOverlap": True, "labelSeparation": 6},
    }
    share = {
        "field": "share",
        "type": "quantitative",
        "title": "share of values, %",
        # Outliers are few: a linear axis would not show them at all.
        "scale": {"type": "symlog", "constant": 0.01, "domainMin": 0},
        "axis": {"values": [0, 0.01, 0.1, 1, 10, 100], "format": "~r"},
        "stack": None,
    }
    colour = {
        "field": "which",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["before", "after"], "range": [BEFORE, AFTER]},
        "legend": {"symbolOpacity": 0.6},
    }
    tooltip = [{"field": name, "format": ".4~g"} for name in ("from", "to", "share")] + [{"field": "which"}]
    is_after = "datum.which == 'after'"
    # One mark for both, as a layer of its own would be empty where nothing is rounded, and Vega warns of that.
    return _lite(
        f"Histogram of {what}, before and after quantization.",
        height=170,
        mark={"type": "bar", "binSpacing": 0, "strokeWidth": 1.2},
        encoding={
            "x": value,
            "x2": {"field": "to"},
            "y": share,
            "y2": {"datum": 0},
            "color": colour,
            "fillOpacity": {"condition": {"test": is_after, "value": 0}, "value": 0.6},
            "stroke": {"condition": {"test": is_after, "value": AFTER}, "value": None},
            "tooltip": tooltip,
        },
    )


def spectrum() -> Spec:
    """Rows {"index", "value", "kept", "rank"}: singular values from the first, and whether the branch has them."""
    points = {
        "mark": {"type": "point", "filled": True, "size": 16},
        "encoding": {
            "x": {"field": "index", "type": "quantitative", "title": "singular values, from the largest"},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": "size, logarithmic",
                "scale": {"type": "log", "nice": False},
                "axis": {"format": "~g", "tickCount": 4, "grid": False},
            },
            "color": {
                "field": "kept",
                "type": "nominal",
                "title": None,
                "scale": {"domain": ["in the branch", "left for the codes"], "range": [COLOURS[5], BEFORE]},
            },
            "tooltip": [{"field": "index"}, {"field": "value", "format": ".4~g"}, {"field": "kept"}],
        },
    }
    rule = {
        "transform": [{"filter": "datum.index == 1"}],
        "mark": {"type": "rule", "strokeDash": [4, 3], "color": COLOURS[5]},
        # Unseen where there is no branch; filtered out it would leave Vega an axis of nothing, which it warns of.
        "encoding": {
            "x": {"field": "rank", "type": "quantitative"},
            "opacity": {"condition": {"test": "datum.rank > 0", "value": 1}, "value": 0},
        },
    }
    return _lite("Singular values of the weight, and the rank that was chosen.", layer=[points, rule], height=170)


def tradeoff(measure: str) -> Spec:
    """Rows {"name", "mib", "weight_error", "output_sqnr"}, one a report; the error in percent."""
    title = {"weight_error": "weight error, %", "output_sqnr": "mean output SQNR, dB"}[measure]
    x = {
        "field": "mib",
        "type": "quantitative",
        "title": "size, MiB",
        "axis": {"format": ".4~g", "tickCount": 8, "labelOverlap": True},
        "scale": {"zero": False, "padding": 40},
    }
    y = {"field": measure, "type": "quantitative", "title": title, "scale": {"zero": False, "padding": 24}}
    points = {
        "mark": {"type": "point", "filled": True, "size": 90, "color": COLOURS[0]},
        "encoding": {
            "x": x,
            "y": y,
            "tooltip": [
                {"field": "name", "title": "report"},
                {"field": "mib", "title": "MiB", "format": ".2~f"},
                {"field": "weight_error", "title": "weight error, %", "format": ".3~f"},
                {"field": "output_sqnr", "title": "mean SQNR, dB", "format": ".2~f"},
            ],
        },
    }
    names = {
        "mark": {"type": "text", "dy": -11, "limit": 160},
        "encoding": {"x": x, "y": y, "text": {"field": "name"}},
    }
    return _lite("Size against error, a point for each report.", layer=[points, names])


def compare(measure: str) -> Spec:
    """Rows {"index", "name", "report", "value"}, two for each layer that is in both reports; errors in percent."""
    title = MEASURES[measure][0]
    # Between 4 and 8 bits errors differ by a factor of ten.
    scale = {"type": "log", "nice": False, "padding": 8} if measure == "weight_error" else _from_zero(measure)
    y = {
        "field": "value",
        "type": "quantitative",
        "title": title,
        "scale": scale,
        "axis": {"format": "~r", "tickCount": 5},  # "~g" writes 40 as 4e+1
    }
    between = {
        "mark": {"type": "line", "strokeWidth": 1, "color": BEFORE, "opacity": 0.6},
        "encoding": {"x": IN_ORDER, "y": y, "detail": [{"field": "index"}, {"field": "name"}]},
    }
    points = {
        "mark": {"type": "point", "filled": True, "opacity": 0.9, "cursor": "pointer"},
        "encoding": {
            "x": IN_ORDER,
            "y": y,
            "color": {"field": "report", "type": "nominal", "title": None, "sort": None, "scale": {"range": COLOURS}},
            "shape": {
                "field": "report",
                "type": "nominal",
                "title": None,
                "sort": None,
                "scale": {"range": ["circle", "square"]},
            },
            "tooltip": [
                {"field": "name", "title": "layer"},
                {"field": "report"},
                {"field": "value", "title": title, "format": ".3~f"},
            ],
        },
    }
    return _lite("Each layer in two reports, joined by a line.", layer=[between, points])


def tree(schemes: list[str], root: str = ROOT) -> Spec:
    """Nodes as `data.tree` makes them. Signals: `root`, the module that fills the picture; `measure`, before or after.

    schemes: in the order of their colours. root: the first of the signals to begin with.
    """
    inside = f"root === '{ROOT}' || datum.id === root || indexof(datum.id, root + '.') === 0"
    box = {"x": {"field": "x0"}, "y": {"field": "y0"}, "x2": {"field": "x1"}, "y2": {"field": "y1"}}
    tooltip = (
        "{module: datum.id, scheme: datum.scheme, 'MiB before': format(datum.before / 1048576, '.3~f'), "
        "'MiB after': format(datum.after / 1048576, '.3~f')}"
    )
    colours = [FLOAT_COLOUR if s == FLOAT else c for s, c in zip(schemes, _enough(schemes), strict=True)]
    bytes_ = "datum.total[measure === 'before' ? 0 : 1]"
    full = f"datum.label + ', ' + ({bytes_} < 1048576 ? format({bytes_} / 1024, '.1f') + ' KiB' "
    full += f": format({bytes_} / 1048576, '.1f') + ' MiB')"
    wide, high = "datum.x1 - datum.x0 - 8", "datum.y1 - datum.y0"
    text = f"{wide} > 6.5 * length({full}) ? {full} : {wide} > 6.5 * length(datum.label) ? datum.label : ''"
    name = {"type": "text", "from": {"data": "groups"}, "interactive": False, "aria": False}
    place = {
        "text": {"signal": f"{high} > 16 ? ({text}) : ''"},
        "x": {"signal": "datum.x0 + 5"},
        "y": {"signal": "datum.y0 + 5"},
    }
    # What is inside of them has its name at the foot, where it is in nobody's way.
    below = {
        "text": {"signal": f"{high} > 40 ? ({text}) : ''"},
        "x": {"signal": "datum.x0 + 5"},
        "y": {"signal": "datum.y1 - 16"},
    }
    letters = {"fontWeight": {"value": "bold"}, "baseline": {"value": "top"}, "fill": {"value": "#fff"}}
    halo = {"stroke": {"value": "#222"}, "strokeWidth": {"value": 3}, "strokeJoin": {"value": "round"}}
    return {
        "$schema": "https://vega.github.io/schema/vega/v6.json",
        "description": "Bytes of each module: its area. Coloured by scheme.",
        "width": 640,
        "height": 340,
        "padding": 0,
        "autosize": {"type": "pad"},
        "config": {key: CONFIG[key] for key in ("background", "legend")},
        "signals": [{"name": "root", "value": root}, {"name": "measure", "value": "after"}],
        "data": [
            {"name": "table"},
            {
                "name": "nodes",
                "source": "table",
                "transform": [
                    {"type": "filter", "expr": inside},
                    {"type": "formula", "as": "up", "expr": "datum.id === root ? null : datum.parent"},
                    {"type": "formula", "as": "size", "expr": "datum[measure] || 0"},
                    {"type": "stratify", "key": "id", "parentKey": "up"},
                    {
                        "type": "treemap",
                        "field": "size",
                        "sort": {"field": "value", "order": "descending"},
                        "ratio": 1.6,
                        "padding": 1,
                        "size": [{"signal": "width"}, {"signal": "height"}],
                    },
                ],
            },
            {"name": "leaves", "source": "nodes", "transform": [{"type": "filter", "expr": "datum.size > 0"}]},
            {"name": "groups", "source": "nodes", "transform": [{"type": "filter", "expr": "datum.depth === 1"}]},
            {"name": "inside", "source": "nodes", "transform": [{"type": "filter", "expr": "datum.depth === 2"}]},
        ],
        "scales": [{"name": "colour", "type": "ordinal", "domain": schemes, "range": colours}],
        "legends": [{"fill": "colour", "orient": "top", "direction": "horizontal", "symbolType": "square"}],
        "marks": [
            {
                "type": "rect",
                "from": {"data": "leaves"},
                "aria": False,
                "encode": {
                    "enter": {"fill": {"scale": "colour", "field": "scheme"}, "cursor": {"value": "pointer"}},
                    "update": {**box, "tooltip": {"signal": tooltip}},
                },
            },
            {
                "type": "rect",
                "from": {"data": "groups"},
                "interactive": False,
                "aria": False,
                "encode": {"enter": {"stroke": {"value": "#fff"}, "strokeWidth": {"value": 2}}, "update": box},
            },
            # White letters on a dark rim are read on every colour.
            {**name, "from": {"data": "inside"}, "encode": {"enter": letters | halo, "update": below}},
            {**name, "from": {"data": "inside"}, "encode": {"enter": letters, "update": below}},
            {**name, "encode": {"enter": letters | halo, "update": place}},
            {**name, "encode": {"enter": letters, "update": place}},
        ],
    }


def with_rows(spec: Spec, rows: list[dict[str, Any]]) -> Spec:
    """The spec with its data in it."""
    table = {"name": "table", "values": rows}
    if isinstance(spec["data"], list):
        return {**spec, "data": [table if d["name"] == "table" else d for d in spec["data"]]}
    return {**spec, "data": table}


def _lite(description: str, height: int = 230, **parts: Any) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": 640,
        "height": height,
        "config": CONFIG,
        "data": {"name": "table"},
        **parts,
    }


def _from_zero(measure: str) -> Spec:
    """No error is a place to start from; no decibels are not."""
    return {"zero": True} if measure == "weight_error" else {"zero": False, "nice": False, "padding": 12}


def _by_scheme() -> Spec:
    return {"field": "scheme", "type": "nominal", "title": None, "scale": {"range": COLOURS}}


def _enough(schemes: list[str]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(schemes))]
