"""Checkpoints whose files or config are damaged or forged: an error that names them, and nothing half loaded."""

import ast
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import qgraft
from qgraft import Quantizer, Recipe, load, save
from qgraft.quantizer import CheckpointError

SVD = Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 2, "group_size": 16}, "min_features": 1})
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STRANGE_DTYPES = ("load", "float32 ", "int8", "complex64", "float8_e4m3fn", "__class__", "", None, 32, ["float32"])


class Net(nn.Module):
    def __init__(self, feed=22, head=True):
        super().__init__()
        self.embed = nn.Embedding(12, 18)
        self.up, self.down = nn.Linear(18, feed), nn.Linear(feed, 18, bias=False)
        self.attention = nn.MultiheadAttention(18, 2)
        self.norm = nn.BatchNorm1d(18)
        if head:
            self.head = nn.Linear(18, 12, bias=False)
            self.head.weight = self.embed.weight

    @property
    def trap(self):
        raise SystemExit("a property of the model was run because a file named it")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = Quantizer(Net()).quantize(SVD, calibration=lambda m: m.down(m.up(torch.randn(3, 18))), progress=False)
    save(model, folder / "one")
    save(model, folder / "shards", shard_bytes=400)
    return folder


@pytest.fixture
def one(good, tmp_path):
    return Path(shutil.copytree(good / "one", tmp_path / "one"))


@pytest.fixture
def shards(good, tmp_path):
    return Path(shutil.copytree(good / "shards", tmp_path / "shards"))


def state(model):
    """All that a failed load must not change: objects, classes, flags, and every bit."""
    modules = {name: (id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return modules, [(n, id(t), t.dtype, t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors]


def refuse(folder, *words, model=None):
    """load() raises a CheckpointError that has all the words, and leaves the model bit for bit as it was."""
    model = model or Net()
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load(folder, model=model)
    assert state(model) == before
    for word in words:
        assert word in str(caught.value)


def edit(folder, change, file="config.json"):
    """Change a JSON file, and put the new checksums in the config, so that the check under test is reached."""
    data = json.loads((folder / file).read_text())
    change(data if file != "config.json" else data["quantization_config"])
    (folder / file).write_text(json.dumps(data))
    record(folder)


def record(folder):
    """What an attacker would do: the checksums protect from accidents, not from intent."""
    data = json.loads((folder / "config.json").read_text())
    files = data["quantization_config"].get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        if (folder / name).is_file() and isinstance(entry, dict):
            raw = (folder / name).read_bytes()
            entry.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (folder / "config.json").write_text(json.dumps(data))


def test_the_undamaged_one_loads(one, shards):
    for folder in (one, shards):
        record(folder)
        assert load(folder, model=Net()).up.scheme_name == "w4a4_svd"


# -- files ----------


@pytest.mark.parametrize("position", [0, 7, 8, 200, -1])
def test_a_flipped_byte_is_noticed(one, position):
    raw = bytearray((one / WEIGHTS).read_bytes())
    raw[position] ^= 1
    (one / WEIGHTS).write_bytes(raw)
    refuse(one, WEIGHTS, "checksum differs")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_noticed_with_both_sizes(one, keep):
    raw = (one / WEIGHTS).read_bytes()
    (one / WEIGHTS).write_bytes(raw[:keep])
    refuse(one, WEIGHTS, f"{len(raw[:keep])} bytes where {len(raw)} were written")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_with_a_forged_checksum_is_no_safetensors_file(one, keep):
    (one / WEIGHTS).write_bytes((one / WEIGHTS).read_bytes()[:keep])
    record(one)
    refuse(one, WEIGHTS, "no readable safetensors file")


@pytest.mark.parametrize("name", ["model-00002-of-", INDEX])
def test_a_missing_shard_or_index_is_named(shards, name):
    file = next(f for f in shards.iterdir() if f.name.startswith(name))
    file.unlink()
    refuse(shards, file.name, "missing")


def test_a_folder_in_place_of_the_weights_is_no_file(one):
    (one / WEIGHTS).unlink()
    (one / WEIGHTS).mkdir()
    refuse(one, WEIGHTS, "missing")


def test_no_folder_an_empty_one_and_a_file_are_no_checkpoints(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    refuse(tmp_path / "nowhere", "nowhere/config.json", "no such file")
    refuse(tmp_path / "empty", "empty/config.json", "no such file")
    refuse(tmp_path / "file", "file/config.json", "cannot be read")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("9" * 5000, "cannot be read"),
        ("[1]", "no JSON object"),
        ("null", "no JSON object"),
        ("{}", "no quantization_config of ours); quantize the model first"),
        ('{"quantization_config": []}', "no quantization_config of ours"),
        ('{"quantization_config": {"quant_method": "hqq"}}', "no quantization_config of ours"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "bits: None; 2, 4, 8 can be read"),
    ],
)
def test_a_config_that_is_none_is_named(one, text, words):
    (one / "config.json").write_bytes(text.encode("latin-1"))
    refuse(one, "config.json", words)


# -- entries of the config ----------


@pytest.mark.parametrize("version", [3, 1, 0, "2", 2.0, True, None, [2], {}])
def test_another_version_says_what_to_do(one, version):
    edit(one, lambda q: q.update(version=version))
    older = version in (0, 1) and version is not True
    refuse(one, "config.json", repr(version), "quantize the model again" if older else "upgrade qgraft")


@pytest.mark.parametrize("key", ["layers", "tied", "files"])
@pytest.mark.parametrize("value", [None, [], "text", 3, {"up": 3}, {"up": None}, {"up": ["x"]}])
def test_entries_of_a_wrong_type_are_named(one, key, value):
    edit(one, lambda q: q.update({key: value}))
    refuse(one, "config.json", f"quantization_config.{key}")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"scheme": "w4a4_svdd"}, ["no scheme 'w4a4_svdd'", "nearest: w4a4_svd"]),
        ({"scheme": ["w8a32"]}, ["no scheme ['w8a32']"]),
        ({"scheme": None}, ["no scheme None"]),
        ({"options": {"rank": "2"}}, ["rank"]),
        ({"options": {"rank": -2}}, ["rank"]),
        ({"options": {"rank": 19}}, ["rank 19"]),
        ({"options": {"evil": 2}}, ["evil"]),
        ({"options": {"self": 2}}, ["self"]),
        ({"options": [1]}, ["options a mapping"]),
        ({"bias": "no"}, ["bias must be true or false"]),
        *(({"dtype": dtype}, ["dtype", repr(dtype)]) for dtype in STRANGE_DTYPES),
        ({"in_features": 19}, ["22 x 18 in the model", "22 x 19 in the checkpoint"]),
        ({"in_features": 2**40, "out_features": 2**40}, ["in the checkpoint"]),
        ({"in_features": 10**400}, ["in the checkpoint"]),
        ({"in_features": "18"}, ["22 x '18'"]),
        ({"in_features": 18.0}, ["layer 'up'"]),
        ({"out_features": None}, ["None x 18"]),
    ],
)
def test_a_wrong_value_in_a_layer_entry_is_named(one, entry, words):
    edit(one, lambda q: q["layers"]["up"].update(entry))
    refuse(one, "one", "up", *words)


@pytest.mark.parametrize("key", ["scheme", "options", "dtype", "bias", "in_features"])
def test_a_value_that_is_missing_in_a_layer_entry_is_named(one, key):
    edit(one, lambda q: q["layers"]["up"].pop(key))
    refuse(one, "one", "'up'", key if key != "in_features" else "22 x None")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("norm", "'norm' is a BatchNorm1d in the model"),
        ("", "'' is a Net in the model"),
        ("attention.out_proj", "MultiheadAttention"),
        ("upp", "no layer 'upp' in the model; nearest: up"),
        ("trap", "no layer 'trap'"),
        ("__class__", "no layer '__class__'"),
        ("up.weight", "no layer 'up.weight'"),
        ("up..", "no layer 'up..'"),
        ("\ud800", "no layer '\\ud800'"),
    ],
)
def test_a_layer_entry_that_names_no_linear_layer_is_refused(one, name, words):
    entry = json.loads((one / "config.json").read_text())["quantization_config"]["layers"]["up"]
    edit(one, lambda q: q["layers"].update({name: {**entry, "in_features": 18, "out_features": 18}}))
    refuse(one, "one", words)


def test_a_shared_layer_must_be_one_layer_in_the_checkpoint_too(one):
    model = Net()
    model.twin = model.up
    refuse(one, "'up' and 'twin' are one layer in the model", model=model)


@pytest.mark.parametrize(
    ("tied", "words"),
    [
        ({"head.weight": "nowhere"}, "'head.weight' is tied to 'nowhere', which is missing"),
        ({"head.weight": "head.weight"}, "tied to 'head.weight', which is missing"),
        ({"head.weight": "norm.bias"}, "shape (18,) in the file, (12, 18) in the model"),
        ({"head.weight": "embed.weight", "norm.bias": "norm.weight"}, "has a value of its own too"),
        ({"head.weight": "embed.weight", "new": "norm.bias"}, "1 tensors are not the model's: new"),
        ({}, "1 tensors are missing: head.weight"),
    ],
)
def test_a_tie_that_does_not_fit_is_named(one, tied, words):
    edit(one, lambda q: q.update(tied=tied))
    refuse(one, words)


# -- no pickle ----------


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "data.pkl", WEIGHTS])
def test_a_pickle_is_never_read(one, name):
    (one / name).write_bytes(pickle.dumps(Bomb()))
    record(one)
    if name == WEIGHTS:
        refuse(one, WEIGHTS, "no readable safetensors file")
    else:
        load(one, model=Net())


def what_could_execute_a_file(tree):
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        found = {name.partition(".")[0] for name in names} & {
            "pickle",
            "cPickle",
            "dill",
            "joblib",
            "marshal",
            "shelve",
        }
        yield from found | {called} & {
            "eval",
            "exec",
            "torch.load",
            "torch.serialization.load",
            "np.load",
            "numpy.load",
        }


def test_no_source_file_of_ours_unpickles_or_evaluates():
    root = Path(qgraft.__file__).resolve().parent
    files = [f for folder in ("quantizer", "layers", "recipes", "kernels") for f in (root / folder).rglob("*.py")]
    assert len(files) > 20
    assert [(f, w) for f in files for w in what_could_execute_a_file(ast.parse(f.read_text(encoding="utf-8")))] == []
    assert list(what_could_execute_a_file(ast.parse("import pickle as p; torch.load(x); from dill import load")))
