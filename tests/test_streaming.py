"""From safetensors to safetensors, layer by layer: the same bytes as in memory, whatever happens on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qgraft
from qgraft import Quantizer, Recipe, quantize_files
from qgraft.quantizer import CheckpointError, QuantizeError, checkpoint, cli, partial, streaming
from qgraft.quantizer.errors import CalibrationError
from qgraft.quantizer.float_files import CannotStream, FloatFiles, Origin
from qgraft.quantizer.partial import Partial

SVD = {"scheme": {"name": "w4a8_svd", "rank": 8}}


class Net(nn.Module):
    """Tied, shared and unquantized parts, and shapes that are no multiple of a group."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(70, 72)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(72, 90), nn.GELU(), nn.Linear(90, 72)) for _ in range(3))
        self.shared = self.blocks[1]
        self.norm = nn.BatchNorm1d(72)
        self.head = nn.Linear(72, 70, bias=False)
        self.head.weight = self.embed.weight


def build(dtype=torch.float32, device=None):
    with torch.device(device or "cpu"):
        return Net().to(dtype)


def float_folder(folder: Path, model: nn.Module) -> Path:
    """The model's state as it would be published: in several files, tied tensors once."""
    folder.mkdir()
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith(("shared", "head"))}
    names = list(tensors)
    half = len(names) // 2
    files = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, group in files.items():
        save_file({n: tensors[n] for n in group}, folder / file)
    weight_map = {n: file for file, group in files.items() for n in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file, byte by byte, but for the seconds that the report tells."""
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "report.json"}
    report = json.loads((folder / "report.json").read_text())
    for row in report["layers"]:
        row["seconds"] = None
    return {**files, "report.json": json.dumps(report).encode()}


def in_memory(model: nn.Module, recipe: Recipe, out: Path, shard_bytes: int) -> dict[str, bytes]:
    qgraft.save(Quantizer(model).quantize(recipe, progress=False), out, shard_bytes=shard_bytes)
    return content(out)


# -- the same bytes ----------------------------------------------------------------------------------------------------

RECIPES = {
    "svd": SVD,
    "tied codes": {
        "scheme": "w8a16",
        "rules": [{"match": ["Embedding"], "scheme": "embedding_w8"}, {"match": ["*.0"], "scheme": "w4a16_asym"}],
    },
    "untied": {"scheme": "w8a8", "rules": [{"match": ["head"], "scheme": "w8a16", "untie": True}]},
    "left as it is": {
        "scheme": "w8a16",
        "rules": [{"match": ["*.0"], "scheme": {"name": "factorized", "energy": 0.999999}, "optional": True}],
    },
}
RECIPES["tied codes"]["rules"][1]["scheme"] = {"name": "w4a16", "zero_point": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:these layers stay as they are")
def test_streamed_files_are_those_of_quantizer_and_save_byte_by_byte(name, dtype, tmp_path):
    recipe, model = Recipe.from_dict(RECIPES[name]), build(dtype)
    folder = float_folder(tmp_path / "model", model)
    report = quantize_files(
        folder, recipe, tmp_path / "streamed", model=build(dtype, "meta"), shard_bytes=9000, progress=False
    )
    expected = in_memory(model, recipe, tmp_path / "memory", 9000)
    assert len(expected) > 4 and content(tmp_path / "streamed") == expected
    assert len(report.layers) == len(json.loads(expected["report.json"])["layers"]) > 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["memory", "model", "streamed"]


transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}
MODELS = {
    "tied llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "conv1d": lambda t: t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=80, n_positions=32)),
    "experts": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_local_experts=3)),
}
RULES = {"experts": [{"match": ["*.gate_up_proj"], "skip": "only one of both is quantized"}]}


@pytest.mark.parametrize("name", MODELS)
def test_the_command_streams_models_of_transformers_and_says_so(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    if name == "experts" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers fuses experts from version 5 on")
    MODELS[name](transformers).to(torch.bfloat16).save_pretrained("model", max_shard_size="60KB")
    Path("recipe.yaml").write_text(json.dumps({**SVD, "rules": RULES.get(name, [])}))
    assert cli.main(["quantize", "model", "-r", "recipe.yaml", "--no-stream", "--out", "memory"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["quantize", "model", "-r", "recipe.yaml", "--out", "streamed"]) == 0
    output = capsys.readouterr()
    assert "peak memory" in output.err and "layer by layer" in output.err
    assert output.out.splitlines()[:5] == table.splitlines()[:5]
    assert content(Path("streamed")) == content(Path("memory"))


def test_what_cannot_be_streamed_is_loaded_as_a_whole_or_refused_if_streaming_was_asked_for(tmp_path, capsys):
    folder = tmp_path / "model"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = ["quantize", str(folder), "-r", "w8a16", "--out"]
    assert cli.main([*command, str(tmp_path / "out"), "--stream"]) == 1
    assert "neither model.safetensors nor" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    assert "as a whole" in capsys.readouterr().err and (tmp_path / "out").exists()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return float_folder(tmp_path / "model", build())


def stream(folder, out, recipe=SVD, **options):
    return quantize_files(folder, Recipe.from_dict(recipe), out, model=build(None, "meta"), progress=False, **options)


def test_files_that_do_not_fit_are_refused_before_the_first_layer(folder, tmp_path):
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    save_file(dict(list(tensors.items())[1:]), second)
    with pytest.raises(CheckpointError, match=r"index.*names tensors that its files do not hold"):
        stream(folder, tmp_path / "out")
    save_file({n: t[:-1] if t.ndim == 2 else t for n, t in tensors.items()}, second)
    with pytest.raises(CheckpointError, match="has shape"):
        stream(folder, tmp_path / "out")
    save_file({n: t.to(torch.int8) if t.ndim == 2 else t for n, t in tensors.items()}, second)
    with pytest.raises(CheckpointError, match="int8 in the files, not float"):
        stream(folder, tmp_path / "out")
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        stream(folder, tmp_path / "out")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        stream(folder, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_each_tensor_that_another_is_made_from_has_to_be_float(tmp_path):
    halves = {"upper": torch.randn(3, 8), "lower": torch.randn(3, 8)}
    origin = Origin(("upper", "lower"), lambda tensors: {"weight": torch.cat([*tensors.values()])})

    def read():
        save_file(halves, tmp_path / "model.safetensors")
        model = nn.Linear(8, 6, bias=False, device="meta")
        return FloatFiles(tmp_path, model, lambda *_: {"weight": origin}).read(["weight"])["weight"]

    assert torch.equal(read(), torch.cat([*halves.values()]))
    halves["lower"] = halves["lower"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"'weight' is torch\.int8 in the files, not float"):
        read()


def test_a_tensor_in_no_file_and_tied_ones_that_differ_cannot_be_streamed(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if n != "norm.bias"}}))
    with pytest.raises(CannotStream, match=r"do not hold 1 tensors: norm\.bias"):
        stream(folder, tmp_path / "out")
    save_file({"head.weight": torch.randn(70, 72)}, folder / "extra.safetensors")
    index.write_text(json.dumps({"weight_map": {**weight_map, "head.weight": "extra.safetensors"}}))
    with pytest.raises(CannotStream, match="are tied, and differ"):
        stream(folder, tmp_path / "out")


def test_a_recipe_that_needs_data_is_refused(folder, tmp_path):
    with pytest.raises(CalibrationError, match="needs calibration data"):
        stream(folder, tmp_path / "out", {"scheme": "w8a8_static"})


def test_a_bad_weight_stops_the_run_with_its_name_and_what_was_done_is_kept(tmp_path):
    model = build()
    with torch.no_grad():
        model.blocks[2][0].weight[3, 5] = float("nan")
    folder, told = float_folder(tmp_path / "model", model), []
    with pytest.raises(QuantizeError, match=r"blocks\.2\.0.*NaN.*goes on from there"):
        stream(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(Partial(tmp_path / "out").parts.iterdir())) == 4
    with pytest.raises(CheckpointError, match=r"unfinished run that differs from this one in recipe, layers"):
        stream(folder, tmp_path / "out", {"scheme": "w8a16"})
    with pytest.raises(QuantizeError, match=r"blocks\.2\.0"):
        stream(folder, tmp_path / "out", say=told.append)
    assert told == ["going on from an interrupted run: 4 of 6 parts are there"]
    for file in folder.glob("*.safetensors"):
        save_file({n: torch.nan_to_num(t) for n, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="differs from this one in files"):
        stream(folder, tmp_path / "out")


def test_another_version_of_qgraft_is_another_run(folder, tmp_path, monkeypatch):
    interrupted(monkeypatch, folder, tmp_path / "out", "graft_empty", streaming)
    monkeypatch.setattr(qgraft, "__version__", "0.0.1")
    with pytest.raises(CheckpointError, match="differs from this one in qgraft; finish that one"):
        stream(folder, tmp_path / "out", shard_bytes=9000)


def test_two_runs_do_not_write_one_folder(folder, tmp_path):
    with Partial(tmp_path / "out").alone(), pytest.raises(CheckpointError, match="another process is writing it"):
        stream(folder, tmp_path / "out")
    stream(folder, tmp_path / "out")


def test_a_run_that_begins_when_another_clears_its_folder_away_is_refused_in_the_same_words(
    folder, tmp_path, monkeypatch
):
    def cleared(lock):
        raise FileNotFoundError(lock.lock_file)

    monkeypatch.setattr(partial.FileLock, "acquire", cleared)
    with pytest.raises(CheckpointError, match="another process is writing it"):
        stream(folder, tmp_path / "out")


# -- interrupted -------------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, folder, out, step, module):
    """A run that ends right after a step, as if it had been killed there."""

    def stops(*args, **kwargs):
        original(*args, **kwargs)
        raise KeyboardInterrupt

    original = getattr(module, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step, stops)
        stream(folder, out, shard_bytes=9000)


@pytest.mark.parametrize("step", ["_keep_other_files", "write_json", "_fingerprint"])
def test_one_that_ends_in_the_last_step_over_an_old_checkpoint_goes_on_with_the_files_of_others(
    step, folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    stream(folder, out, shard_bytes=9000)
    expected = content(out)
    (out / "more").mkdir()
    (out / "more" / "file").write_text("of others")
    save_file({"a": torch.ones(3)}, out / "adapter.safetensors")
    for _ in range(2):
        interrupted(monkeypatch, folder, out, step, checkpoint)
    stream(folder, out, shard_bytes=9000)
    assert (out / "more" / "file").read_text() == "of others"
    (out / "more" / "file").unlink(), (out / "more").rmdir(), (out / "adapter.safetensors").unlink()
    assert content(out) == expected
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "out"]


def test_what_was_left_of_a_folder_that_was_being_cleared_away_is_no_part_of_the_next_run(
    folder, tmp_path, monkeypatch
):
    left = Partial(tmp_path / "out")
    interrupted(monkeypatch, folder, tmp_path / "out", "write_json", checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        left.done()
    assert any(left.parts.iterdir()) and any(left.checkpoint.iterdir())
    other = {"scheme": {"name": "w4a8_svd", "rank": 8, "smooth": "none"}}
    stream(folder, tmp_path / "out", other, shard_bytes=9000)
    stream(folder, tmp_path / "fresh", other, shard_bytes=9000)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_files_that_were_being_written_go_when_the_next_run_begins(folder, tmp_path, monkeypatch):
    root = Partial(tmp_path / "out").root
    interrupted(monkeypatch, folder, tmp_path / "out", "graft_empty", streaming)
    for name in (".tmpAB12CD", "00003.safetensors.4711.new"):
        (root / name).write_bytes(b"half of it")
    interrupted(monkeypatch, folder, tmp_path / "out", "graft_empty", streaming)
    assert {file.name for file in root.iterdir()} <= {"job.json", "parts", "checkpoint", "lock"}


# -- killed ------------------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
import qgraft
from qgraft.quantizer.partial import Partial

torch.set_num_threads(1)
folder, out, seed = sys.argv[1:]
random.seed(int(seed))
recipe = qgraft.Recipe.from_dict({"scheme": {"name": "w4a8_svd", "rank": 8}})

def build():
    return nn.Sequential(*(nn.Linear(96, 96) for _ in range(40)))

def run():
    with torch.device("meta"):
        model = build()
    qgraft.quantize_files(folder, recipe, out, model=model, shard_bytes=20000, progress=False)

torch.manual_seed(0)
qgraft.save(qgraft.Quantizer(build()).quantize(recipe, progress=False), out + ".memory", shard_bytes=20000)
partial = Partial(Path(out))

def done():
    try:
        return sum(len(os.listdir(folder)) for folder in (partial.parts, partial.checkpoint))
    except FileNotFoundError:  # not begun, or ended
        return 0

kills = went_on = 0
while True:
    before = done()
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    until = before + random.randint(3, 20)
    while done() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.002)
    else:
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    went_on += before > 0
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        sys.exit(os.WEXITSTATUS(status) or (f"{kills} kills" if not went_on else 0))
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, seed):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(nn.Sequential(*(nn.Linear(96, 96) for _ in range(40))).state_dict(), folder / "model.safetensors")
    out = tmp_path / "out"
    run(KILLED, folder, out, seed)
    assert content(out) == content(tmp_path / "out.memory")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "out", "out.memory"]


def run(script: str, *args) -> str:
    command = [sys.executable, "-c", script, *map(str, args)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # an arena takes 64 MiB of addresses
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# -- larger than memory ------------------------------------------------------------------------------------------------

LARGE = """
import json, resource, sys
from pathlib import Path
import torch
from torch import nn
import qgraft
from qgraft.quantizer.distributed import peak_memory

torch.set_num_threads(1)
folder, out = sys.argv[1:]
sizes, files = json.loads(Path(folder, "sizes.json").read_text())
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + files * 2 // 3,) * 2)

def build(device):
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(k, n, bias=False, dtype=torch.bfloat16) for n, k in sizes))

recipe = qgraft.Recipe.from_dict({"scheme": {"name": "w8a8", "zero_point": True}})
before = peak_memory()
qgraft.quantize_files(folder, recipe, out, model=build("meta"), shard_bytes=files // 8, progress=False)
grown = peak_memory() - before
try:
    build("cpu")
    print("it fits")
except (RuntimeError, MemoryError):
    print(grown)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_model_larger_than_the_memory_that_is_left(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = [(512, 1024), (1024, 512)] * 48
    weight_map = {}
    for first in range(0, len(sizes), 8):
        file = f"model-{first // 8 + 1:05d}-of-00012.safetensors"
        layers = range(first, first + 8)
        values = [torch.randint(-99, 99, sizes[i], dtype=torch.int8).bfloat16() for i in layers]
        save_file({f"{i}.weight": value for i, value in zip(layers, values, strict=True)}, folder / file)
        weight_map.update({f"{i}.weight": file for i in layers})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = sum(2 * n * k for n, k in sizes)
    (folder / "sizes.json").write_text(json.dumps([sizes, files]))
    grown = int(run(LARGE, folder, tmp_path / "out"))
    print(f"{files >> 20} MiB of weights quantized with a peak of {grown >> 20} MiB above what was imported")
    assert grown < files * 2 // 3
    codes = load_file(next((tmp_path / "out").glob("model-00001*.safetensors")))
    weight = load_file(folder / "model-00001-of-00012.safetensors")["0.weight"].float()
    back = (codes["0.qweight"].float() - codes["0.zero_point"].float()[:, None]) * codes["0.scale"][:, None]
    assert (weight - back).abs().max() <= codes["0.scale"].max()
