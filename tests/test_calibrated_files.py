"""Calibrated recipes from file to file: block by block, with the same bytes as in memory."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sequential import WIDTH, Model
from test_streaming import MODELS, RULES, content, run
from torch import nn

import qgraft
from qgraft import Quantizer, Recipe, quantize_files
from qgraft.quantizer import CalibrationError, CheckpointError, PlanError, QuantizeError, calibrated_files, cli
from qgraft.quantizer.float_files import CannotStream
from qgraft.quantizer.paging import PagedModel

SHARD = 9000


def recipe(scheme="w4a16", rules=(), **more):
    options = {"w4a16": {"group_size": 32}, "w4a8_svd": {"rank": 4, "group_size": 32}}.get(scheme, {})
    spec = {"samples": 10_000, **more}
    whole = {"scheme": {"name": scheme, **options}, "min_features": 1, "calibration": spec, "rules": list(rules)}
    return Recipe.from_dict(whole)


@pytest.fixture
def data():
    mix = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    return [torch.randn(4, 16, WIDTH) @ mix for _ in range(6)]


class Run:
    """A model in files, and what becomes of it, on both ways."""

    def __init__(self, base: Path, build):
        self.base, self.build, self.model = base, build, build()
        (base / "model").mkdir()
        self.save()

    def save(self):
        distinct = {id(t): (n, t) for n, t in reversed(self.model.state_dict(keep_vars=True).items())}
        save_file(dict(distinct.values()), self.base / "model" / "model.safetensors")

    def stream(self, data, spec=None, **options):
        with torch.device("meta"):
            skeleton = self.build()
        where = self.base / "model", spec or recipe(), self.base / "streamed"
        options = {"calibration": data, "shard_bytes": SHARD, "progress": False, **options}
        return quantize_files(*where, model=skeleton, **options)

    def in_memory(self, data, spec=None):
        model = Quantizer(copy.deepcopy(self.model)).quantize(spec or recipe(), calibration=data, progress=False)
        qgraft.save(model, self.base / "memory", shard_bytes=SHARD)
        return content(self.base / "memory")

    @property
    def streamed(self):
        return content(self.base / "streamed")


@pytest.fixture
def made(tmp_path):
    return lambda build=Model: Run(tmp_path, build)


# -- the same bytes ----------------------------------------------------------------------------------------------------

KINDS = {
    "a chain": (dict(), recipe()),
    "statistics in several passes": (dict(), recipe(sequential=False)),
    "a chain of two parts": ({"broken": (2,)}, recipe("w4a8_svd")),
    "no chain": ({"twice": True}, recipe()),
    "blocks that change their input": ({"in_place": True}, recipe()),
    "ranges only": (dict(), recipe("w8a8_static")),
    "some layers": (dict(), recipe(rules=[{"match": ["*.b", "blocks.1.*"], "skip": "float"}])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_files_are_those_of_quantizer_and_save_byte_by_byte(kind, made, data, monkeypatch, tmp_path):
    if "passes" in kind:
        monkeypatch.setattr("qgraft.quantizer.stages.STATS_BYTES", 5 * 4 * WIDTH**2)
    options, spec = KINDS[kind]
    run = made(lambda: Model(**options))
    report = run.stream(data, spec)
    assert run.streamed == run.in_memory(data, spec)
    assert len(report.layers) > 8 and all(row.output_sqnr is not None for row in report.layers)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["memory", "model", "streamed"]


def test_blocks_in_a_sequence_are_read_one_at_a_time_too(made, data):
    def build():
        blocks = (nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)) for _ in range(3))
        return nn.Sequential(nn.LayerNorm(WIDTH), *blocks)

    run = made(build)
    report = run.stream(data)
    assert run.streamed == run.in_memory(data) and len(report.layers) == 6


class Tied(Model):
    """An embedding with codes that its head shares, a weight in two blocks, and buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(60, WIDTH), nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 60, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[3].c.weight = self.blocks[1].c.weight

    def forward(self, ids):
        return super().forward(self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2))


def test_tied_weights_inside_and_outside_of_blocks(made):
    rules = [
        {"match": ["embed"], "scheme": "embedding_w8"},
        {"match": ["head"], "scheme": "w8a16"},
        {"match": ["*.c"], "skip": "tied"},
    ]
    run, ids, spec = made(Tied), [torch.randint(60, (3, 11)) for _ in range(4)], recipe(rules=rules)
    run.stream(ids, spec)
    assert run.streamed == run.in_memory(ids, spec)


transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", MODELS)
def test_the_command_streams_with_calibration_text(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "experts" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers fuses experts from version 5 on")
    from test_cli_models import LINES, save_tokenizer

    MODELS[name](transformers).to(torch.bfloat16).save_pretrained("model", max_shard_size="60KB")
    save_tokenizer("model", "[CLS] $A")
    Path("text.txt").write_text("\n".join(LINES * 9))
    scheme = {"name": "w4a4_svd", "rank": 8, "group_size": 16}
    rules = [*RULES.get(name, []), {"match": ["lm_head"], "skip": "tied", "optional": True}]
    spec = {"scheme": scheme, "rules": rules, "calibration": {"samples": 5, "tokens": 24}}
    Path("recipe.yaml").write_text(json.dumps(spec))
    command = ["quantize", "model", "-r", "recipe.yaml", "--calibration", "text.txt"]
    assert cli.main([*command, "--out", "streamed"]) == 0
    assert "block by block, with 5 sequences of text" in capsys.readouterr().err
    assert cli.main([*command, "--no-stream", "--out", "memory"]) == 0
    assert "as a whole: --no-stream" in capsys.readouterr().err
    assert content(Path("streamed")) == content(Path("memory"))


# -- one block at a time -----------------------------------------------------------------------------------------------


def test_each_block_is_read_once_in_a_pass_however_many_batches_there_are_and_no_two_are_there_at_once(
    made, data, monkeypatch
):
    read, largest, run = [], 0, made(lambda: Model(5))
    original = PagedModel._read

    def watched(self, block):
        nonlocal largest
        original(self, block)
        read.append(block)
        there = sum(t.nbytes for t in self.model.state_dict().values() if not t.is_meta)
        largest = max(largest, there)

    monkeypatch.setattr(PagedModel, "_read", watched)
    run.stream(data)
    blocks = [f"blocks.{i}" for i in range(5)]
    # To find the chain, for the two layers that are in no block, and to quantize.
    assert read == ["", *blocks, *blocks, *blocks]
    bytes_of = {name: sum(t.nbytes for t in m.state_dict().values()) for name, m in run.model.named_modules()}
    assert largest <= bytes_of["inp"] + bytes_of["head"] + bytes_of["blocks.0"]


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a chain", "statistics in several passes", "a chain of two parts", "no chain"])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bytes(kind, made, data, monkeypatch):
    monkeypatch.setattr("qgraft.quantizer.stages.STATS_BYTES", 5 * 4 * WIDTH**2)
    options, spec = KINDS[kind]
    run, told, grafted = made(lambda: Model(**options)), [], []
    original = calibrated_files.graft
    left = 0

    def stops(model, planned, *rest):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        grafted.append(planned.name)
        return original(model, planned, *rest)

    monkeypatch.setattr(calibrated_files, "graft", stops)
    for more in torch.randint(1, 6, (2,)).tolist():
        left = more
        with pytest.raises(KeyboardInterrupt):
            run.stream(data, spec)
    assert not (run.base / "streamed").exists()
    left = 100
    run.stream(data, spec, say=told.append)
    assert "going on from an interrupted run" in told[0]
    assert 18 <= len(grafted) <= 18 + 2 * 4  # no more is made again than what goes together with the last layer
    assert run.streamed == run.in_memory(data, spec)


def test_other_data_is_another_run(made, data, monkeypatch):
    run, original = made(), calibrated_files.graft
    monkeypatch.setattr(
        calibrated_files, "graft", lambda m, p, *rest: original(m, p, *rest) if p.name == "inp" else 1 / 0
    )
    with pytest.raises(QuantizeError, match=r"layer 'head' .*goes on from there"):
        run.stream(data)
    monkeypatch.undo()
    for other in (data[:-1], [*data[:-1], data[-1] + 1], None):
        with pytest.raises(CheckpointError, match="differs from this one in calibration"):
            run.stream(other)
    assert len(run.stream(data).layers) == 18


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_go_block_by_block_is_refused_before_any_work(made, data, monkeypatch):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(WIDTH, WIDTH)

    run = made(Single)
    with pytest.raises(CannotStream, match="no list of blocks"):
        run.stream(data)
    with pytest.raises(CalibrationError, match="a function runs the whole model"):
        run.stream(lambda model: model(data[0]))
    monkeypatch.setattr("qgraft.quantizer.distributed.Ranks.meet", lambda *_: None)
    monkeypatch.setattr("qgraft.quantizer.distributed.Ranks._part", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CalibrationError, match="without torchrun"):
        run.stream(data)
    assert sorted(f.name for f in run.base.iterdir()) == ["model"]


def test_buffers_that_nobody_knows_are_refused(made, data):
    class Positions(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(9), persistent=False)

    with pytest.raises(CannotStream, match="no file holds the buffers table"):
        made(Positions).stream(data)


@pytest.mark.parametrize("name", ["inp", "blocks.3.out"])
def test_bad_weights_are_found_before_the_first_layer(name, made, data, monkeypatch):
    run = made()
    run.model.get_submodule(name).weight.data[3, 5] = torch.nan
    run.save()
    monkeypatch.setattr(calibrated_files, "graft", None)
    with pytest.raises(PlanError, match=f"layer '{name}' has NaN"):
        run.stream(data)
    assert sorted(f.name for f in run.base.iterdir()) == ["model"]


def test_data_that_does_not_run_says_why_and_leaves_nothing(made, data):
    run = made()
    data[2] = data[2][..., :-1]
    with pytest.raises(CalibrationError, match=r"calibration batch 2 \(\(4, 16, 31\)"):
        run.stream(data)
    assert sorted(f.name for f in run.base.iterdir()) == ["model"]
    assert load_file(run.base / "model" / "model.safetensors").keys() == run.model.state_dict().keys()


# -- larger than memory ------------------------------------------------------------------------------------------------

LARGE = """
import resource, sys
import torch
from torch import nn
import qgraft
from qgraft.benchmarks.memory import status

torch.set_num_threads(1)
folder, out, count = sys.argv[1:]

class Model(nn.Module):
    def __init__(self, count):
        super().__init__()
        pairs = ((nn.Linear(512, 1024), nn.Linear(1024, 512)) for _ in range(count))
        self.layers = nn.ModuleList(nn.Sequential(up, nn.GELU(), down) for up, down in pairs)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

recipe = qgraft.Recipe.from_dict({"scheme": {"name": "w8a8_static"}, "calibration": {"samples": 99}})
data = [torch.randn(1, 8, 512) for _ in range(4)]
with torch.device("meta"):
    skeleton = Model(int(count))
qgraft.Quantizer(Model(2)).quantize(recipe, calibration=data, progress=False)  # what that imports is no part of it
files = sum(2 ** 20 * 4 for _ in skeleton.layers)
used = status("VmSize")
resource.setrlimit(resource.RLIMIT_AS, (used + files * 2 // 3,) * 2)
qgraft.quantize_files(folder, recipe, out, model=skeleton, calibration=data, shard_bytes=files // 8, progress=False)
grown = status("VmPeak") - used
try:
    Model(int(count))
    print("it fits")
except (RuntimeError, MemoryError):
    print(grown)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_model_larger_than_the_memory_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 18))  # else glibc keeps much of what is freed
    (tmp_path / "model").mkdir()
    count, weight_map = 24, {}
    for i in range(count):
        shapes = {"0.weight": (1024, 512), "0.bias": (1024,), "2.weight": (512, 1024), "2.bias": (512,)}
        tensors = {f"layers.{i}.{name}": torch.randn(shape) / 64 for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model" / f"{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{i}.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    grown = int(run(LARGE, tmp_path / "model", tmp_path / "out", count))
    print(
        f"{4 * count} MiB of weights calibrated and quantized with a peak of {grown >> 20} MiB above what was imported"
    )
    assert grown < 4 * count * 2 // 3 << 20
