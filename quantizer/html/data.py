"""What the page and the figures show, as plain data: one `Shown` a report.

Rows stay the dicts of report.json, so that a field which this version does not know is shown all the same.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from ...layers import QuantLayer
from ..checkpoint import REPORT, read_config, read_json
from ..errors import CheckpointError
from ..report import LayerReport, Report
from ..weight_files import read_kinds, weight_files
from .advice import Advice, advise, notes_on, notes_on_rest

Row = dict[str, Any]

# The fields of a row that have their place on the page; others are shown as they are.
KNOWN = frozenset(f.name for f in fields(LayerReport)) - {"rank", "smooth_alpha", "won"} | {"options"}
ROOT, FLOAT = "(the model)", "float"
# An SQNR that only an output without any error has: float32 ends at some 140 dB. In a mean it would be all that counts.
EXACT = 200.0


@dataclass
class Shown:
    """One report.

    rows: a dict a layer, as in report.json, and the `options` of its scheme where they are known.
    modules: {"name", "scheme", "before", "after"} of every module that has tensors of its own; bytes. Where only a
    report is known, the quantized layers.
    """

    name: str
    rows: list[Row]
    modules: list[Row]
    whole: bool = False  # whether `modules` is the whole model
    advice: list[list[Advice]] = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self):
        self.advice = advise(self.rows)
        self.notes = notes_on(self.rows) + (notes_on_rest(self.modules) if self.whole else [])

    @property
    def before(self) -> int:
        return sum(m["before"] for m in self.modules)

    @property
    def after(self) -> int:
        return sum(m["after"] for m in self.modules)

    @property
    def float_bytes(self) -> int:
        """Bytes of what is not quantized."""
        return sum(m["after"] for m in self.modules if m["scheme"] is None)

    @property
    def flagged(self) -> list[int]:
        """Indices of the layers there is advice for, the largest error first: of the output if it is known."""
        found = [i for i, items in enumerate(self.advice) if items]
        return sorted(found, key=lambda i: -_error(self.rows[i]))

    @property
    def rules(self) -> str:
        """The rules that the advice comes to, one for each layer, as YAML; "" if there are none."""
        wanted = (next((item.rule for item in self.advice[i] if item.rule), "") for i in self.flagged)
        return "".join(wanted)

    @property
    def worst(self) -> Row | None:
        return max(self.rows, key=lambda r: r["weight_error"], default=None)

    @property
    def weight_error(self) -> float | None:
        """sqrt of the mean of the squared relative errors, each layer counted by its weights."""
        weights = [r["in_features"] * r["out_features"] for r in self.rows]
        if not sum(weights):
            return None
        squares = sum(w * r["weight_error"] ** 2 for w, r in zip(weights, self.rows, strict=True))
        return math.sqrt(squares / sum(weights))

    @property
    def sqnr(self) -> float | None:
        """The mean over the layers that have one, in dB; those that lose nothing count only if all are so."""
        known = [r["output_sqnr"] for r in self.rows if r.get("output_sqnr") is not None]
        found = [sqnr for sqnr in known if sqnr < EXACT] or known
        return sum(found) / len(found) if found else None

    @property
    def seconds(self) -> float:
        return sum(r["seconds"] for r in self.rows)

    @property
    def schemes(self) -> list[str]:
        """Of the modules, FLOAT last: the order of their colours."""
        return sorted({m["scheme"] or FLOAT for m in self.modules}, key=lambda scheme: (scheme == FLOAT, scheme))

    @property
    def extra(self) -> list[str]:
        """Fields of the rows that are plain values and that this page has no column for, in order."""
        names = dict.fromkeys(k for r in self.rows for k in r if k not in KNOWN)
        return [k for k in names if any(_is_plain(r.get(k)) for r in self.rows)]

    def row(self, layer: str) -> Row:
        """The row of a layer; CheckpointError with the nearest names if there is none."""
        from ...recipes import did_you_mean

        for row in self.rows:
            if row["name"] == layer:
                return row
        raise CheckpointError(f"{self.name}: no quantized layer {layer!r}{did_you_mean(layer, self.names)}")

    @property
    def names(self) -> list[str]:
        return [row["name"] for row in self.rows]


def read(path: str | Path) -> Shown:
    """From a checkpoint folder, or a report.json alone. CheckpointError if it cannot be read."""
    path = Path(path)
    if path.is_file():
        rows = _rows(path)
        return Shown(str(path), rows, _modules_of(rows))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder or file; give one that qgraft.save() wrote, or a report.json")
    quantization = read_config(path)
    if not (path / REPORT).exists():
        raise CheckpointError(f"{path}: holds no {REPORT}; only models that qgraft quantized itself have one")
    rows = _rows(path / REPORT)
    for row in rows:
        row["options"] = quantization["layers"].get(row["name"], {}).get("options") or {}
    kinds = read_kinds(weight_files(path, quantization["files"]))
    sizes: dict[str, int] = {}
    for name, (shape, dtype) in kinds.items():
        owner = name.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + (math.prod(shape) * dtype.itemsize if dtype else 0)
    return Shown(path.name or str(path), rows, _modules(rows, sizes, quantization["layers"], path), whole=True)


def from_report(report: Report, name: str = "", model: nn.Module | None = None) -> Shown:
    """From a report in memory; with its model, also what is not quantized."""
    rows = [asdict(row) for row in report.layers]
    for row in rows:
        row["options"] = {}
    if model is None:
        return Shown(name or "report", rows, _modules_of(rows))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    for row in rows:
        if row["name"] in layers:
            row["options"] = layers[row["name"]].scheme.model_dump()
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            owner = key.rpartition(".")[0]
            sizes[owner] = sizes.get(owner, 0) + tensor.nbytes
    schemes = {n: {"scheme": m.scheme_name} for n, m in layers.items()}
    return Shown(name or type(model).__name__, rows, _modules(rows, sizes, schemes, None), whole=True)


def _rows(file: Path) -> list[Row]:
    data = read_json(file)
    try:
        Report.from_dict(data)
        rows = data["layers"]
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"{file}: is no report of qgraft: {error}") from None
    return [{**row, "options": {}} for row in rows]


def _modules(rows: list[Row], sizes: dict[str, int], schemes: dict[str, Row], path: Path | None) -> list[Row]:
    before = {row["name"]: (row["bytes_before"], row["bytes_after"]) for row in rows}
    inside = {name: name for name in schemes}
    modules: dict[str, Row] = {}
    for owner, size in sizes.items():
        home = _layer_of(owner, inside)
        entry = schemes.get(home, {})
        module = modules.setdefault(
            home, {"name": home, "scheme": entry.get("scheme"), "before": before.get(home, (0, 0))[0], "after": 0}
        )
        module["after"] += size
        if home not in before:
            module["before"] += size
    return [m for m in modules.values() if m["before"] or m["after"]]


def _layer_of(owner: str, layers: dict[str, str]) -> str:
    """The quantized layer that a module is inside of, or the module itself."""
    name = owner
    while name:
        if name in layers:
            return name
        name = name.rpartition(".")[0]
    return owner


def _modules_of(rows: list[Row]) -> list[Row]:
    return [
        {"name": r["name"], "scheme": r["scheme"], "before": r["bytes_before"], "after": r["bytes_after"]} for r in rows
    ]


def tree(modules: Iterable[Row]) -> list[Row]:
    """The modules as nodes {"id", "parent", "label", "scheme", "before", "after"} of one tree; only leaves have bytes.

    Each has the "total" of what is in it, [before, after]. The root's id is ROOT, as an empty one is none for Vega. A
    module that has tensors of its own and children too gets a leaf for its own.
    """
    modules = list(modules)
    if not modules:
        return []
    inner = {""}
    for module in modules:
        parts = module["name"].split(".")
        inner.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    nodes = [_node(name, name, None if name == "" else _above(name)) for name in sorted(inner, key=_natural)]
    for module in modules:
        name = module["name"]
        own = name in inner
        node = _node(f"{name}.(own)".lstrip("."), "(own)", name or ROOT) if own else _node(name, name, _above(name))
        sizes = {"scheme": module["scheme"] or FLOAT, "before": module["before"], "after": module["after"]}
        nodes.append({**node, **sizes})
    by_id = {node["id"]: node for node in nodes}
    for leaf in nodes[len(inner) :]:
        node: Row | None = leaf
        while node is not None:
            node["total"][0] += leaf["before"]
            node["total"][1] += leaf["after"]
            node = by_id.get(node["parent"])
    return nodes


def top(nodes: list[Row]) -> str:
    """The id of the first node of a tree that has more than one module inside: there is something to see."""
    at = ROOT
    while True:
        inside = [node for node in nodes if node["parent"] == at and any(node["total"])]
        if len(inside) != 1 or "after" in inside[0]:
            return at
        at = inside[0]["id"]


def _node(name: str, label: str, parent: str | None) -> Row:
    return {"id": name or ROOT, "parent": parent, "label": label.rpartition(".")[2] or ROOT, "total": [0, 0]}


def _above(name: str) -> str:
    return name.rpartition(".")[0] or ROOT


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _error(row: Row) -> float:
    sqnr = row.get("output_sqnr")
    return row["weight_error"] if sqnr is None else 10 ** (-sqnr / 20)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))
