"""`qgraft inspect`: what is in a checkpoint, from its config, its report and the headers of its files."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from . import tables
from .checkpoint import CONFIG, read_config, read_json
from .cli_options import Debug, Every, Json, QuantizedDir
from .cli_output import show, show_json
from .errors import CheckpointError
from .loading import read_reports
from .report import LayerReport, Report
from .rules import ALL
from .weight_files import read_kinds, weight_files


def inspect(folder: QuantizedDir, every: Every = False, as_json: Json = False, debug: Debug = False) -> None:
    """Show what is in a quantized model, and check it.

    Compares the checksums of its files and reads their headers, but loads no weights.

    \b
    Example: qgraft inspect ./w4a4 --json
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that `qgraft quantize` wrote")
    found = summary(folder)
    if as_json:
        show_json(found)
        return
    model = ", ".join(found["architectures"]) or "model of no known class"
    share = found["bytes_quantized"] / found["bytes"] if found["bytes"] else 0
    show(
        f"{folder}: {model}\n"
        f"{len(found['layers'])} quantized layers of {found['bits_per_weight']:.2f} bits per weight\n"
        f"{tables.size(found['bytes'])} in {tables.count(len(found['files']), 'file')}, whose checksums are right; "
        f"{100 * share:.0f} % of it is quantized layers",
        _table(found, every),
    )


def summary(path: Path) -> dict[str, Any]:
    """Everything as plain data. CheckpointError if a file is missing or damaged."""
    quantization = read_config(path)
    kinds = read_kinds(weight_files(path, quantization["files"]))
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items() if dtype}
    of_owner: dict[str, int] = {}
    for name, size in sizes.items():
        owner = name.rpartition(".")[0]
        of_owner[owner] = of_owner.get(owner, 0) + size
    shared = {_owner(name): _owner(source) for name, source in quantization["tied"].items()}
    reports = read_reports(path)
    layers = []
    for name, entry in quantization["layers"].items():
        shape = entry.get("out_features"), entry.get("in_features")
        if not all(isinstance(side, int) and side > 0 for side in shape):
            raise CheckpointError(f"{path / CONFIG}: layer {name!r} has no shape")
        size = of_owner.get(name, 0)
        layers.append(
            {
                "name": name,
                "same_as": shared.get(name) if not size else None,
                "scheme": entry.get("scheme"),
                "options": entry.get("options") or {},
                "shape": list(shape),
                "bytes": size,
                "bits_per_weight": 8 * size / math.prod(shape),
                "report": _numbers(reports[name]) if name in reports else None,
            }
        )
    weights = sum(math.prod(layer["shape"]) for layer in layers if not layer["same_as"])
    quantized = sum(layer["bytes"] for layer in layers)
    return {
        "path": str(path),
        "architectures": read_json(path / CONFIG).get("architectures") or [],
        "version": quantization["version"],
        "files": quantization["files"],
        "bytes": sum(sizes.values()),
        "bytes_quantized": quantized,
        "bits_per_weight": 8 * quantized / weights if weights else 0.0,
        "layers": layers,
    }


def _numbers(report: LayerReport) -> dict[str, Any]:
    """Without the histograms, which are for the HTML report."""
    return {key: value for key, value in asdict(report).items() if key != "details"}


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _table(found: dict[str, Any], every: bool) -> Table:
    rows = [layer["report"] for layer in found["layers"] if layer["report"]]
    caption = Report.from_dict({"layers": rows}).summary() if rows else "no report was saved"
    table = tables.layer_table(None, caption)
    table.add_column("shape", no_wrap=True)
    table.add_column("scheme", overflow="fold", ratio=3)
    for column in ("bits", "size", "weight\nerror", "output\nSQNR"):
        table.add_column(column, justify="right", no_wrap=True)
    lines = []
    for layer in found["layers"]:
        report = layer["report"] or {}
        scheme = f"same as {layer['same_as']}" if layer["same_as"] else _scheme(layer)
        key = ("x".join(map(str, layer["shape"])), scheme, f"{layer['bits_per_weight']:.2f}")
        sums = (layer["bytes"], 1, report.get("weight_error"), report.get("output_sqnr"))
        lines.append((layer["name"] or "(the model)", key, sums))
    for names, key, (size, count, error, sqnr) in tables.collapse(lines, every):
        tables.add_layer(
            table,
            names,
            *key,
            tables.size(size),
            "-" if error is None else f"{100 * error / count:.2f} %",
            "-" if sqnr is None else f"{sqnr / count:.1f} dB",
        )
    return table


def _scheme(layer: dict[str, Any]) -> str:
    """The scheme with the options that are not its defaults; all, if this qgraft does not know it."""
    cls = ALL.get(layer["scheme"])
    fields = cls.Scheme.model_fields if cls else {}
    options = {k: v for k, v in layer["options"].items() if k not in fields or v != fields[k].default}
    text = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{layer['scheme']} ({text})" if text else str(layer["scheme"])
