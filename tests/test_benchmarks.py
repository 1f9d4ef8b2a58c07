"""The benchmark runner: what it writes, that it never times a wrong answer, and that no peer is lost in silence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qgraft
from qgraft.benchmarks import candidates, gate, measure, peers, roofline, run, timing
from qgraft.benchmarks.peers import Compiled, Peer
from qgraft.layers import SCHEMES, W8A16Linear, W8A32Linear

ROOT = Path(qgraft.__file__).parent
CEILINGS = {
    "copy_gb_per_s": 8.0,
    "read_gb_per_s": 10.0,
    "matmul_tflops": {"float32": 0.1, "bfloat16": 0.2, "int8": 0.5},
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0.01)
    monkeypatch.setattr(measure, "ROUNDS", (2, 3))
    monkeypatch.setattr(roofline, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(peers, "PEERS", ())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small gain nothing from more, and on a busy machine they wait for each other
    yield
    torch.set_num_threads(threads)


def results(argv: list[str], file: Path, code: int = 0) -> dict:
    assert run.main([*argv, "--json", str(file)]) == code
    return json.loads(file.read_text())


def test_every_scheme_is_measured_with_every_number_of_tokens(tmp_path, capsys):
    file = tmp_path / "new" / "layers.json"
    data = results(["--shape", "64x128", "--tokens", "5,1"], file)
    assert data["command"].startswith("python -m qgraft.benchmarks.run --shape 64x128")
    assert data["machine"]["cpu"] and data["machine"]["cores"] >= 1
    assert data["machine"]["versions"]["torch"] == torch.__version__
    assert data["ceilings"] == CEILINGS and data["not_run"] == []
    measured = {(row["scheme"], row["tokens"]) for row in data["rows"]}
    assert measured == {(scheme, m) for scheme in (*SCHEMES, "F.linear") for m in (1, 5)}
    floats = {(row["tokens"], row["dtype"]): row for row in data["rows"] if row["library"] == "torch"}
    for row in data["rows"]:
        n, k, m = *row["shape"], row["tokens"]
        assert row["ok"]
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["ratio"] == pytest.approx(floats[m, row["dtype"]]["median_ms"] / row["median_ms"])
        width = 4 if row["dtype"] == "float32" else 2
        assert row["bytes_moved"] == row["weight_bytes"] + width * m * (n + k)
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        assert row["tflops"] == pytest.approx(2 * m * n * k / row["median_ms"] / 1e9)
        assert row["roof_share"] > 0
        assert row["error_weights"] < 1 and row["held_bytes"] >= 0 <= row["peak_bytes"]
        if row["library"] == "qgraft":
            assert 0 <= row["error_formula"] < row["error_weights"]
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_only_the_named_schemes_and_shapes_are_measured(tmp_path):
    argv = ["--scheme", "w8a32", "--shape", "32x32", "--shape", "32x16", "--tokens", "2"]
    rows = results(argv, tmp_path / "layers.json")["rows"]
    expected = [(scheme, [32, k]) for k in (32, 16) for scheme in ("F.linear", "F.linear", "w8a32")]
    assert [(row["scheme"], row["shape"]) for row in rows] == expected


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
    argv = ["--scheme", "w8a32", "--scheme", "w8a16", "--shape", "64x64", "--tokens", "3"]
    rows = {row["scheme"]: row for row in results(argv, tmp_path / "layers.json", code=1)["rows"]}
    assert not rows["w8a32"]["ok"] and "median_ms" not in rows["w8a32"] and "ratio" not in rows["w8a32"]
    assert rows["w8a16"]["ok"] and rows["w8a16"]["median_ms"] > 0
    printed = capsys.readouterr()
    assert "WRONG" in printed.out and "w8a32 64x64, 3 tokens: wrong result" in printed.err


# ---- peers ----------------------------------------------------------------------------------------------------------


def peer(scheme: str, make, library: str = "numpy", **options) -> Peer:
    """numpy stands for a library that is installed."""
    return Peer(library, scheme, make, limit=0.03, **options)


class Only(nn.Linear):
    """Takes one token, as some kernels do."""

    def forward(self, x):
        if len(x) != 1:
            raise NotImplementedError("one token only\nand a long story")
        return super().forward(x)


def halved(linear):
    linear.weight.data *= 0.5
    return linear


def slow(linear):
    linear.register_forward_pre_hook(lambda *_: candidates.time.sleep(0.4))
    return linear


def of_class(cls):
    def make(linear):
        linear.__class__ = cls
        return linear

    return make


def broken(linear):
    torch.set_float32_matmul_precision("high")
    raise ImportError("no such kernel")


def test_a_peer_that_is_wrong_slow_broken_or_absent_is_reported_as_that(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(candidates, "SLOW", 0.3)
    monkeypatch.setattr(candidates, "SLOWER_THAN_FLOAT", 0)
    everyone = (
        peer("right", lambda linear: linear),
        peer("wrong", halved),
        peer("slow", slow),
        peer("one", of_class(Only)),
        peer("broken", broken),
        peer("absent", halved, library="no-such-library"),
        peer("gpu", halved, devices=("cuda",)),
    )
    monkeypatch.setattr(peers, "PEERS", everyone)
    argv = ["--scheme", "w8a32", "--shape", "96x64", "--tokens", "1,3"]
    data = results([*argv, "--peer", "numpy", "--peer", "no-such-library"], tmp_path / "layers.json")
    rows = {(row["scheme"], row["dtype"], row["tokens"]): row for row in data["rows"]}
    for dtype in ("float32", "bfloat16"):
        for m in (1, 3):
            assert rows["right", dtype, m]["ok"] and rows["right", dtype, m]["ratio"] > 0
            assert not rows["wrong", dtype, m]["ok"] and "ratio" not in rows["wrong", dtype, m]
            assert rows["wrong", dtype, m]["error_weights"] == pytest.approx(0.5, abs=0.1)
        assert "median_ms" in rows["one", dtype, 1]
    reasons = {(item["scheme"], tuple(item["tokens"])): item["reason"] for item in data["not_run"]}
    assert reasons["slow", (1, 3)].startswith("too slow: a call with 1 tokens")
    assert reasons["one", (3,)] == "NotImplementedError: one token only"
    assert reasons["broken", ()] == "ImportError: no such kernel"
    assert "make bench-peers" in reasons["absent", ()] and "cuda only" in reasons["gpu", ()]
    assert len(data["not_run"]) == 2 * 5  # each in both types
    out = capsys.readouterr().out
    assert out.count("not run: ") == 10 and "WRONG" in out
    assert torch.get_float32_matmul_precision() == "highest"
    assert data["peers"] == {"numpy": everyone[0].version}
    # Without --peer: those that are installed.
    data = results(argv, tmp_path / "layers.json")
    assert {row["library"] for row in data["rows"]} == {"torch", "qgraft", "numpy"}
    assert results([*argv, "--peer", "none"], tmp_path / "layers.json")["peers"] == {}


def test_a_peer_leaves_the_linear_and_the_settings_as_they_were():
    linear = nn.Linear(8, 8)
    before, threads = linear.weight.clone(), torch.get_num_threads()

    def make(own):
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        return halved(own)

    peer("rude", make).build(linear)
    assert torch.equal(linear.weight, before)
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32


def test_what_is_compiled_is_compiled_for_each_number_of_tokens_and_each_copy(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: compiled.append(call) or call)
    layer = Compiled(nn.Linear(8, 8))
    copy = candidates.Compiled.__deepcopy__(layer, {})
    copy.layer.weight.data += 1
    for m in (1, 2, 1):
        x = torch.ones(m, 8)
        assert torch.equal(layer(x), layer.layer(x)) and torch.equal(copy(x), copy.layer(x))
    # Dynamo gives up on a code object that it has compiled too often.
    assert len(compiled) == len({call.__code__ for call in compiled}) == 4


# ---- the gate -------------------------------------------------------------------------------------------------------


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
        (["--peer", "w9"], "no peer"),
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
