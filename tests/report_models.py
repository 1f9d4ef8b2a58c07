"""A small quantized model and made-up reports, for the tests of the HTML report."""

import random

import torch
from torch import nn

from qgraft import Quantizer, Recipe, save
from qgraft.quantizer.html.data import Shown

HOSTILE = "</script><img src=x onerror=alert(1)>{{7*7}}&amp;\"'"


class Small(nn.Module):
    """An embedding, blocks of two linear layers, and a head; ids (B, T) -> (B, T, 40)."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(48, 64), "down": nn.Linear(64, 48)}) for _ in range(blocks)
        )
        self.head = nn.Linear(48, 40)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.head(x)


def quantized(scheme, details=True):
    model = Small()
    recipe = Recipe.from_dict({"scheme": scheme, "min_features": 1, "rules": [{"match": ["head"], "skip": "head"}]})
    quantizer = Quantizer(model)
    quantizer.quantize(recipe, calibration=torch.randint(0, 50, (4, 20)), progress=False, details=details)
    return quantizer


def saved(folder, scheme, details=True):
    save(quantized(scheme, details).model, folder)
    return folder


def made_up(count, name="made up", hostile=False, **extra):
    """A report of `count` layers with details, without a model; layer 7 stands out."""
    rows = []
    for i in range(count):
        counts = [random.randrange(1000) for _ in range(64)]
        spectrum = {"values": [10 / (j + 1) for j in range(128)], "energy": 200.0, "rank": 32}
        hist = {"low": -1.5, "high": 1.5, "before": counts, "after": counts[::-1]}
        rows.append(
            {
                "name": f"model.layers.{i // 7}.proj{i % 7}" + (HOSTILE if hostile else ""),
                "scheme": "w4a4_svd",
                "in_features": 1024,
                "out_features": 1000 + i,
                "weight_error": 0.5 if i == 7 else random.uniform(0.095, 0.105),
                "output_sqnr": {3: None, 7: 12.0}.get(i, random.uniform(20, 22)),
                "bytes_before": 4 * 1024 * (1000 + i),
                "bytes_after": 600 * (1000 + i),
                "tokens": 4096,
                "seconds": 0.5,
                "options": {"rank": 32},
                "details": {"weight": hist, "input": {**hist, "tokens": 256, "peak": 9.0, "peak_rounded": 3.0},
                            "spectrum": spectrum},
                **extra,
            }
        )  # fmt: skip
    modules = [
        {"name": r["name"], "scheme": r["scheme"], "before": r["bytes_before"], "after": r["bytes_after"]} for r in rows
    ]
    return Shown(name, rows, modules)
