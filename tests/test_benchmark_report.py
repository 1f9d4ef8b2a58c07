"""What the benchmarks make of their numbers: verdicts, shares of the roof, memory, whole models, the drawn report."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qgraft.benchmarks import end_to_end, memory, peers, report, roofline, run, shapes, targets
from qgraft.benchmarks.layer_table import verdict_cell
from qgraft.benchmarks.peers import LIMIT_4, LIMIT_8, Peer
from qgraft.benchmarks.subjects import Speed, Subject
from qgraft.quantizer.tables import to_text

PEAKS = {"float32": 0.1, "bfloat16": 0.2, "int8": 0.5}
CEILINGS = {"copy_gb_per_s": 8.0, "read_gb_per_s": 10.0, "matmul_tflops": PEAKS}


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
    cells = {key: verdict_cell(v) for key, v in verdicts.items()}
    assert cells["W8A32", 16] == "NO 1.50/2.5" and cells["W8A32", 4] == "? -/3"
    assert cells["W8A32 error", 1] == "ok 1e-04/5e-04"


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


# ---- whole models ---------------------------------------------------------------------------------------------------


class Tiny(Subject):
    """A model of two layers whose output head is known as one, and a quality that tells a wrong model from a right."""

    name, quality_name, quality_format = "tiny", "perplexity", "{:.2f}"
    setting, calibration = "Nothing to see.", []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64)

        def get_output_embeddings(self):
            return self.head

        def forward(self, x):
            return self.head(self.body(x))

    def __init__(self):
        self.model, self.x = self.Model(), torch.randn(8, 64)
        self.right = self.model(self.x).detach()
        self.speeds = (Speed("decode", 8, self.run, (2, 2)),)

    def in_dtype(self, dtype):
        model = self.Model()
        model.load_state_dict(self.model.state_dict())
        return model.to(dtype)

    def quality(self, model):
        return 1 + 100 * (model(self.x.to(next(model.parameters()).dtype)).float() - self.right).norm().item()

    def run(self, model):
        model(self.x.to(next(model.parameters()).dtype))
        return 0.5 if model.body.__class__ is nn.Linear else 0.25

    def probe(self, model):
        return self.right

    def sample(self, model):
        return ""


class Theirs(nn.Linear):
    pass


def as_theirs(scale: float):
    def make(linear):
        linear.weight.data *= scale
        linear.__class__ = Theirs
        return linear

    return make


def no(linear):
    raise RuntimeError("not on this CPU")


def test_whole_models_take_turns_and_none_is_lost():
    subject = Tiny()
    others = [
        Peer("numpy", "good", as_theirs(1), LIMIT_8),
        Peer("numpy", "mad", as_theirs(30), LIMIT_8),
        Peer("numpy", "no", no, LIMIT_8),
        Peer("no-such-library", "int8", no, LIMIT_8),
    ]
    data = json.loads(json.dumps(end_to_end.measure(subject, ["w8a32", "w8a16"], others, print)))
    rows = {(row["scheme"], row["dtype"]): row for row in data["rows"]}
    assert rows["w8a32", "float32"]["speeds"]["decode"]["ratio"] == 2
    assert rows["good", "bfloat16"]["speeds"]["decode"]["tokens_per_s"] == 32
    assert rows["float", "float32"]["bytes"] == 2 * 4 * 65 * 64
    assert not rows["mad", "float32"]["ok"] and "speeds" not in rows["mad", "float32"]
    reasons = {(item["scheme"], item["dtype"]): item["reason"] for item in data["not_run"]}
    assert reasons["no", "float32"] == "RuntimeError: not on this CPU"
    assert "not installed" in reasons["int8", "bfloat16"] and len(reasons) == 4
    text = to_text(end_to_end.table(data))
    assert "32.0 (2.00x)" in text and "WRONG" in text and "numpy mad" in text


@pytest.mark.parametrize(("limit", "head"), [(LIMIT_8, Theirs), (LIMIT_4, nn.Linear)])
def test_peers_quantize_the_layers_that_ours_of_the_same_width_do(limit, head):
    model = end_to_end.theirs(Tiny.Model(), Peer("numpy", "x", as_theirs(1), limit))
    assert type(model.body) is Theirs and type(model.head) is head


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path, monkeypatch) -> Path:
    """A folder with a run of the layers, one of the models, and a file of something else."""
    pytest.importorskip("matplotlib")
    wrong = Peer("numpy", "wrong", as_theirs(0.5), LIMIT_8)
    absent = Peer("no-such-library", "int8", no, LIMIT_8)
    monkeypatch.setattr(peers, "PEERS", (wrong, absent))
    monkeypatch.setattr(roofline, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(run, "BUSY", 1e9)
    monkeypatch.setattr(targets, "BY_DEVICE", {"cpu": (
        targets.Target("Fast", ("w8a32",), "float32", (64, 64), {1: 1e9, 4: 0.0, 16: 1.0}, "ratio"),
    )})  # fmt: skip
    folder = tmp_path / "cpu"
    argv = ["--scheme", "w8a32", "--shape", "64x64", "--tokens", "1,4", "--peer", "numpy", "--peer", "no-such-library"]
    assert run.main([*argv, "--json", str(folder / "layers.json")]) == 0
    origin = json.loads((folder / "layers.json").read_text())
    models = {key: origin[key] for key in ("command", "device", "machine", "peers")}
    models |= {"model": "tiny", **end_to_end.measure(Tiny(), ["w8a32"], [], print)}
    (folder / "models.json").write_text(json.dumps(models))
    (folder / "other.json").write_text("[]")
    return folder


def test_the_report_shows_gains_verdicts_and_what_went_wrong(measured, capsys):
    assert report.main([str(measured)]) == 0
    page = (measured / "report.md").read_text()
    rows = {row["tokens"]: row for row in json.loads((measured / "layers.json").read_text())["rows"]
            if row["scheme"] == "w8a32"}  # fmt: skip
    assert f"| w8a32 | {rows[1]['ratio']:.2f} | {rows[4]['ratio']:.2f} |" in page
    assert "| numpy wrong | **wrong** | **wrong** |" in page
    fast = next(line for line in page.splitlines() if line.startswith("| Fast"))
    assert f"**{rows[1]['ratio']:.2f} (>= 1e+09)** | {rows[4]['ratio']:.2f} (>= 0) | **? (>= 1)** |" in fast
    assert "- no-such-library int8, float32, bfloat16: no-such-library is not installed" in page
    assert "| w8a32 | fp32 |" in page and "(2.00x)" in page  # of the model
    assert "other.json" in page
    drawn = {file.name for file in measured.glob("*.svg")}
    assert drawn == {"layers-64x64-fp32.svg", "layers-64x64-roof.svg", "models-speeds.svg"}
    assert all(f"]({name})" in page for name in drawn)
    before = {file: file.read_bytes() for file in measured.iterdir()}
    report.draw(measured)
    assert before == {file: file.read_bytes() for file in measured.iterdir()}


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "run make bench first" in capsys.readouterr().err
