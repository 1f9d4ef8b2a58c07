"""The benchmark runner: what it writes, and that it never times a wrong answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qgraft
from qgraft.benchmarks import gate, run, timing
from qgraft.layers import SCHEMES, W8A16Linear, W8A32Linear

ROOT = Path(qgraft.__file__).parent


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(run, "BUDGET", 0.01)
    monkeypatch.setattr(run, "ROUNDS", (2, 3))


def test_every_scheme_is_measured_at_every_shape_and_number_of_tokens(tmp_path, capsys):
    file = tmp_path / "new" / "layers.json"
    argv = ["--shape", "64x128", "--shape", "128x64", "--tokens", "1,5", "--json", str(file)]
    assert run.main(argv) == 0
    data = json.loads(file.read_text())
    assert data["command"].startswith("python -m qgraft.benchmarks.run --shape 64x128")
    assert data["machine"]["cpu"] and data["machine"]["cores"] >= 1
    assert data["machine"]["versions"]["torch"] == torch.__version__
    measured = {(row["scheme"], tuple(row["shape"]), row["tokens"]) for row in data["rows"]}
    assert measured == {(s, shape, m) for s in SCHEMES for shape in ((64, 128), (128, 64)) for m in (1, 5)}
    for row in data["rows"]:
        assert row["ok"]
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert 0 < row["weight_bytes"] < row["float_bytes"] + 4 * 128 * 64
        assert row["gb_per_s"] > 0
        assert 0 <= row["error_formula"] < row["error_weights"] < 0.3
        base = row["baselines"][f"F.linear {row['dtype']}"]["median_ms"]
        assert row["ratio"] == pytest.approx(base / row["median_ms"])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_only_the_named_schemes_are_measured(tmp_path):
    file = tmp_path / "layers.json"
    assert run.main(["--scheme", "w8a32", "--shape", "32x32", "--tokens", "2", "--json", str(file)]) == 0
    assert [row["scheme"] for row in json.loads(file.read_text())["rows"]] == ["w8a32"]


def spoil(monkeypatch, how: str) -> None:
    quantize, linear = W8A32Linear.quantize, W8A32Linear._linear
    if how == "scale":  # the codes no longer fit, and dequantize() is as wrong as forward()

        def bad_quantize(self, weight, stats=None):
            quantize(self, weight, stats)
            self.scale = self.scale * 1.1

        monkeypatch.setattr(W8A32Linear, "quantize", bad_quantize)
    elif how == "kernel":  # close to the float layer, but not what the layer says it computes
        monkeypatch.setattr(W8A32Linear, "_linear", lambda self, x: linear(self, x) * 1.0001)
    else:
        monkeypatch.setattr(W8A32Linear, "_linear", lambda self, x: linear(self, x) * torch.nan)


@pytest.mark.parametrize("how", ["scale", "kernel", "nan"])
def test_a_wrong_layer_is_not_timed_and_the_run_fails(how, monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, how)
    file = tmp_path / "layers.json"
    argv = ["--scheme", "w8a32", "--scheme", "w8a16", "--shape", "64x64", "--tokens", "3"]
    assert run.main([*argv, "--json", str(file)]) == 1
    rows = {row["scheme"]: row for row in json.loads(file.read_text())["rows"]}
    assert not rows["w8a32"]["ok"] and "median_ms" not in rows["w8a32"] and "ratio" not in rows["w8a32"]
    assert rows["w8a16"]["ok"] and rows["w8a16"]["median_ms"] > 0
    printed = capsys.readouterr()
    assert "WRONG" in printed.out and "w8a32 64x64, 3 tokens: wrong result" in printed.err


def test_the_gate_sees_a_scale_that_was_tampered_with():
    linear = nn.Linear(256, 64)
    layer, x = W8A16Linear.from_linear(linear), torch.randn(9, 256).bfloat16()
    with torch.no_grad():
        assert gate.check(layer, linear, x, layer(x)).ok
        layer.scale[7] *= 2
        errors = gate.check(layer, linear, x, layer(x))
    assert not errors.ok
    assert errors.formula < 4e-3 < errors.weights


def test_a_scheme_that_rounds_activations_does_not_pass_without_its_own_formula(monkeypatch):
    monkeypatch.delitem(gate.FORMULAS, "w4a4_svd")
    linear = nn.Linear(256, 64)
    layer, x = SCHEMES["w4a4_svd"].from_linear(linear), torch.randn(9, 256)
    with torch.no_grad():
        assert not gate.check(layer, linear, x, layer(x)).ok


def test_candidates_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or 0.5 for name in "abc"}
    times = timing.interleaved(runs, budget=0, rounds=(4, 9))
    rounds = [sorted(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == [["a", "b", "c"]] * 5  # the first of them warms up
    assert {len(t.seconds) for t in times.values()} == {4}
    assert times["a"].median == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "64"], "write NxK"),
        (["--shape", "0x64"], "at least 1"),
        (["--tokens", "1,none"], "write 1,16,256"),
        (["--tokens", "0"], "write 1,16,256"),
        (["--scheme", "w9"], "w8a16"),
    ],
)
def test_a_bad_option_is_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_there_are_times_in_a_graph_and_eager(tmp_path):
    file = tmp_path / "layers.json"
    argv = ["--device", "cuda", "--shape", "1024x1024", "--tokens", "1,16", "--json", str(file)]
    assert run.main(argv) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["median_ms"] > 0 and row["eager"]["median_ms"] > 0


def test_it_also_runs_as_a_module_of_the_repository_root():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "benchmarks.run", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--tokens" in done.stdout
