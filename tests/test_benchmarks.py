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
from qgraft.benchmarks import candidates, gate, measure, memory, peers, roofline, run, shapes, targets, timing
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


def results(argv: list[str], file: Path, code: int = 0) -> dict:
    assert run.main([*argv, "--json", str(file)]) == code
    return json.loads(file.read_text())


def test_every_scheme_is_measured_at_every_shape_and_number_of_tokens(tmp_path, capsys):
    file = tmp_path / "new" / "layers.json"
    data = results(["--shape", "64x128", "--shape", "128x64", "--tokens", "5,1"], file)
    assert data["command"].startswith("python -m qgraft.benchmarks.run --shape 64x128")
    assert data["machine"]["cpu"] and data["machine"]["cores"] >= 1
    assert data["machine"]["versions"]["torch"] == torch.__version__
    assert data["ceilings"] == CEILINGS and data["not_run"] == []
    measured = {(row["scheme"], tuple(row["shape"]), row["tokens"]) for row in data["rows"]}
    names = [*SCHEMES, "F.linear"]
    assert measured == {(s, shape, m) for s in names for shape in ((64, 128), (128, 64)) for m in (1, 5)}
    floats = {(*row["shape"], row["tokens"], row["dtype"]): row for row in data["rows"] if row["library"] == "torch"}
    for row in data["rows"]:
        n, k, m = *row["shape"], row["tokens"]
        assert row["ok"]
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["ratio"] == pytest.approx(floats[n, k, m, row["dtype"]]["median_ms"] / row["median_ms"])
        width = 4 if row["dtype"] == "float32" else 2
        assert row["bytes_moved"] == row["weight_bytes"] + width * m * (n + k)
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        assert row["tflops"] == pytest.approx(2 * m * n * k / row["median_ms"] / 1e9)
        assert row["roof_share"] > 0
        assert row["error_weights"] < 0.3 and row["held_bytes"] >= 0 <= row["peak_bytes"]
        if row["library"] == "qgraft":
            assert 0 <= row["error_formula"] < row["error_weights"]
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_only_the_named_schemes_are_measured(tmp_path):
    data = results(["--scheme", "w8a32", "--shape", "32x32", "--tokens", "2"], tmp_path / "layers.json")
    assert [row["scheme"] for row in data["rows"]] == ["F.linear", "F.linear", "w8a32"]


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
    linear.register_forward_pre_hook(lambda *_: candidates.time.sleep(0.03))
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
    monkeypatch.setattr(candidates, "SLOW", 0.02)
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


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def row(scheme: str, tokens: int, ms: float, base: float = 6.0, library: str = "qgraft", **more) -> dict:
    known = {"library": library, "scheme": scheme, "tokens": tokens, "dtype": "float32", "shape": [4096, 4096]}
    return {**known, "ok": True, "median_ms": ms, "ratio": base / ms, "error_formula": 1e-4, **more}


def test_targets_are_judged_by_the_rows():
    wrong = {key: value for key, value in row("w8a32", 4, 1.0).items() if key not in ("median_ms", "ratio")}
    rows = [row("w8a32", 1, 2.0), {**wrong, "ok": False, "error_formula": 0.1}, row("w8a32", 16, 4.0)]
    verdicts = {(v.target.label, v.tokens): v for v in targets.judge(rows, "cpu")}
    assert verdicts["W8A32", 1].word == "reached" and verdicts["W8A32", 1].value == 3.0
    assert verdicts["W8A32", 16].word == "missed" and verdicts["W8A32", 16].limit == 2.5
    assert verdicts["W8A32", 4].word == "not measured" and verdicts["W8A32", 64].ok is None
    assert verdicts["W8A32 error", 4].word == "missed" and verdicts["W8A32 error", 1].word == "reached"
    assert verdicts["never slower", 1].ok and ("W8A16", 1) not in verdicts
    slow = targets.judge([row("w8a32", 1, 7.0, shape=[64, 64])], "cpu")
    assert [(v.target.label, v.ok) for v in slow] == [("never slower", False)]


def test_gpu_targets_compare_with_other_rows():
    big = {"dtype": "bfloat16", "shape": [8192, 8192], "roof_share": 0.9, "host_us": 20.0}
    rows = [row("w8a16", 1, 1.0, **big), row("F.linear", 1, 2.0, library="torch", **big),
            row("A16W8", 1, 1.05, library="gemlite", **big)]  # fmt: skip
    words = {v.target.measure: v.word for v in targets.judge(rows, "cuda") if v.tokens == 1}
    assert words["roof_share"] == words["bfloat16"] == "reached"
    assert words["gemlite W8"] == words["host_us"] == "missed"
    assert "gemlite W4" not in words


def test_the_roof_is_memory_for_few_tokens_and_arithmetic_for_many():
    # 10 GB/s read: 1 GB takes 0.1 s. 0.1 TFLOP/s: 10^11 operations take 1 s; int8 does them in 0.2 s.
    assert roofline.share(CEILINGS, "float32", 10**9, 10**9, 0.2) == pytest.approx(0.5)
    assert roofline.share(CEILINGS, "float32", 10**9, 10**11, 2.0) == pytest.approx(0.5)
    assert roofline.share(CEILINGS, roofline.compute_type("w4a4_svd", "float32"), 1, 10**11, 0.2) == pytest.approx(1.0)
    assert roofline.share(CEILINGS, "float16", 1, 1, 1.0) is None


def test_the_ceilings_are_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    monkeypatch.setattr(roofline, "COPY_BYTES", 8 << 20)
    monkeypatch.setattr(roofline, "SIDES", {"cpu": (64,)})
    found = roofline.measure("cpu")
    assert found["copy_gb_per_s"] > 0 and found["read_gb_per_s"] > 0
    assert {"float32", "bfloat16"} <= set(found["matmul_tflops"]) and min(found["matmul_tflops"].values()) > 0


def test_memory_that_a_library_hides_is_counted():
    class State:
        def __init__(self):
            self.packed, self.same = torch.zeros(1000), None

    layer = nn.Linear(10, 10, bias=False)
    layer.state = State()
    layer.state.same = [layer.state.packed[10:], layer.weight]
    assert memory.tensor_bytes(layer) == 4000 + 400


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_scratch_space_and_what_stays_are_seen():
    size = 64 << 20
    assert 0.9 * size < memory.peak_of(lambda: torch.ones(size // 4).sum(), "cpu") < 1.5 * size
    kept, grown = memory.held_by(lambda: torch.ones(size // 4), "cpu")
    assert 0.9 * kept.nbytes < grown < 1.5 * size


def test_shapes_have_names():
    assert shapes.parse("4096X64") == ((4096, 64),)
    assert (12288, 3072) in shapes.parse("flux") and (8192, 8192) in shapes.parse("squares")
    with pytest.raises(ValueError, match="llama-8b"):
        shapes.parse("llama")


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
