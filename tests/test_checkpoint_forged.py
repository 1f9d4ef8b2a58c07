"""Checkpoints whose tensors, shards or index do not fit: refused by name, whatever bytes they are made of."""

import copy
import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from qgraft import Quantizer, Recipe, load, save
from qgraft.quantizer import CheckpointError, loading

SVD = Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 2, "group_size": 16}, "min_features": 1})
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def net():
    model = nn.ModuleDict({"up": nn.Linear(18, 22), "down": nn.Linear(22, 18), "norm": nn.BatchNorm1d(18)})
    model["embed"] = nn.Embedding(9, 18)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = Quantizer(net()).quantize(SVD, progress=False)
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
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    tensors = (*model.named_parameters(), *model.named_buffers())
    return modules, [(n, id(t), t.dtype, t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors]


def refuse(folder, *words, model=None):
    model = model or net()
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load(folder, model=model)
    assert state(model) == before
    for word in words:
        assert word in str(caught.value)


def record(folder, add=()):
    """Put the checksums of the files as they are now into the config, so that they do not hide what follows."""
    data = json.loads((folder / "config.json").read_text())
    files = data["quantization_config"]["files"]
    for name in [*files, *add]:
        raw = (folder / name).read_bytes() if (folder / name).is_file() else b""
        files[name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "config.json").write_text(json.dumps(data))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    record(folder)


def edit_index(folder, change):
    data = json.loads((folder / INDEX).read_text())
    change(data)
    (folder / INDEX).write_text(json.dumps(data))
    record(folder)


# -- tensors ----------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("up.qweight"), "1 tensors are missing: up.qweight"),
        (lambda t: t.pop("norm.running_mean"), "1 tensors are missing: norm.running_mean"),
        (lambda t: t.update(extra=torch.zeros(3)), "1 tensors are not the model's: extra"),
        (lambda t: t.update({"up.extra": torch.zeros(3)}), "not the model's: up.extra"),
        (lambda t: t.update({"up.scale": torch.zeros(21)}), "'up.scale' has shape (21,) in the file, (22,)"),
        (lambda t: t.update({"up.scale": torch.zeros(22, 1)}), "'up.scale' has shape (22, 1)"),
        (lambda t: t.update({"embed.weight": torch.zeros(9, 17)}), "'embed.weight' has shape (9, 17)"),
        (lambda t: t.update({"up.qweight": t["up.qweight"].float()}), "'up.qweight' is torch.float32 in the file"),
        (lambda t: t.update({"up.qweight": t["up.qweight"].view(torch.int8)}), "'up.qweight' is torch.int8"),
        (lambda t: t.update({"up.scale": t["up.scale"].long()}), "'up.scale' is torch.int64 in the file"),
        (lambda t: t.update({"norm.weight": t["norm.weight"].int()}), "'norm.weight' is torch.int32"),
        (lambda t: t.update({"norm.weight": t["norm.weight"].to(torch.float8_e5m2)}), "'norm.weight' is torch.float8"),
        (lambda t: t.update({"norm.weight": t["norm.weight"].to(torch.uint16)}), "of an unknown type"),
        (lambda t: t.update({"norm.num_batches_tracked": torch.zeros(())}), "'norm.num_batches_tracked' is"),
        (lambda t: t.clear(), "tensors are missing"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(one, change, words):
    edit_tensors(one, change)
    refuse(one, "one is not for this model", words)


def test_many_problems_are_counted_and_the_first_ones_shown(one):
    edit_tensors(one, lambda t: t.update({f"extra{i:02}": torch.zeros(1) for i in range(40)}))
    refuse(one, "40 tensors are not the model's: extra00, extra01", "... and 35 more")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Linear(18, 22), "no layer 'up' in the model"),
        (lambda: nn.ModuleDict({**net(), "more": nn.Linear(3, 3)}), "2 tensors are missing: more.bias, more.weight"),
        (lambda: nn.ModuleDict({**net(), "up": nn.Linear(22, 18)}), "'up' is 18 x 22 in the model, 22 x 18 in the"),
        (lambda: nn.ModuleDict({**net(), "up": nn.Linear(18, 22, bias=False)}), ""),
        (lambda: nn.ModuleDict({**net(), "up": nn.utils.weight_norm(nn.Linear(18, 22))}), "'up' cannot be replaced"),
        (lambda: nn.ModuleDict({k: v for k, v in net().items() if k != "norm"}), "tensors are not the model's: norm"),
        (lambda: nn.ModuleDict({**net(), "lazy": nn.LazyLinear(3)}), "no shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_another_model_is_refused(one, model, words):
    model = model()
    kinds = [(id(m), type(m)) for m in model.modules()]
    if words:
        with pytest.raises(CheckpointError, match=re.escape(words)):
            load(one, model=model)
        assert [(id(m), type(m)) for m in model.modules()] == kinds
    else:  # the checkpoint says whether there is a bias
        assert load(one, model=model)["up"].bias is not None


def test_a_module_with_extra_state_is_refused_before_anything_changes(one):
    class Extra(nn.BatchNorm1d):
        def get_extra_state(self):
            return {"a": 1}

    refuse(one, "'norm._extra_state'", model=nn.ModuleDict({**net(), "norm": Extra(18)}))


@pytest.mark.parametrize("step", ["replace", "_tie_again", "load_state_dict", "second replace"])
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), RuntimeError("from a hook")])
def test_a_failure_while_all_is_put_in_place_takes_everything_back(one, monkeypatch, step, error):
    model, calls = net(), []
    original = loading.replace

    def fail(*args, **kw):
        calls.append(1)
        if step == "second replace" and len(calls) == 1:
            return original(*args, **kw)
        raise error

    before = state(model)
    owner = nn.Module if step == "load_state_dict" else loading
    monkeypatch.setattr(owner, step.removeprefix("second "), fail)
    wrapped = step == "load_state_dict" and isinstance(error, RuntimeError)
    with pytest.raises(CheckpointError if wrapped else type(error)):
        load(one, model=model)
    assert state(model) == before and calls


# -- shards and index ----------


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/model.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "", ".", "..",
     "x.safetensors", "model.safetensors\n", "config.json", "model.bin", "m\0.safetensors", "\ud800", "n" * 5000,
     3, None, [1]],
)  # fmt: skip
def test_a_file_name_that_save_does_not_write_is_not_opened(one, shards, name):
    outside = shards.parent / "x.safetensors"
    save_file({"up.qweight": torch.zeros(1)}, outside)
    edit_index(shards, lambda index: index["weight_map"].update({"up.qweight": name}))
    refuse(shards, INDEX, "does not write, refused: ", repr(str(name)))
    if isinstance(name, str):  # the same name, recorded in the config
        data = json.loads((one / "config.json").read_text())
        data["quantization_config"]["files"][name] = {"size": 0, "sha256": ""}
        (one / "config.json").write_text(json.dumps(data))
        refuse(one, "config.json", "does not write, refused: ", repr(name))


def test_a_shard_that_is_not_recorded_is_not_read(shards):
    name = "model-00099-of-00099.safetensors"
    save_file({"up.qweight": torch.zeros(1)}, shards / name)
    edit_index(shards, lambda index: index["weight_map"].update({"up.qweight": name}))
    refuse(shards, name, "not recorded in config.json")


def test_a_tensor_in_two_shards_is_refused(shards):
    files = sorted(shards.glob("model-*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    save_file({**second, **dict([next(iter(first.items()))])}, files[1])
    record(shards)
    refuse(shards, files[1].name, "another file holds too")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_named(shards, weight_map):
    edit_index(shards, lambda index: index.update(weight_map=weight_map))
    refuse(shards, INDEX, "has no weight_map")


def test_an_index_that_was_not_recorded_is_not_followed(one):
    (one / INDEX).write_text(json.dumps({"weight_map": {"up.qweight": "../x.safetensors"}}))
    assert load(one, model=net())["up"].scheme_name == "w4a4_svd"


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": [{"name": "up"}]}', '{"layers": 3}', "{}"])
def test_a_damaged_report_is_named(one, text):
    (one / "report.json").write_text(text)
    refuse(one, "report.json")


def test_a_missing_report_is_no_damage(one):
    (one / "report.json").unlink()
    assert load(one, model=net())["up"].report is None


# -- fuzz ----------

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def loads_or_is_refused(folder):
    """The only two outcomes; a refused model is as it was."""
    model = net()
    before = state(model)
    try:
        loaded = load(folder, model=model)
    except CheckpointError:
        assert state(model) == before
    else:
        assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()}


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@FUZZ
@given(data=st.data(), new=JSON, delete=st.booleans())
def test_any_value_anywhere_in_the_config_is_loaded_or_refused(one, good, data, new, delete):
    config = json.loads((good / "one" / "config.json").read_text())
    path = data.draw(st.sampled_from([p for p in places(config) if p and p[-1] != "sha256"]))
    inside = config
    for key in path[:-1]:
        inside = inside[key]
    if delete:
        del inside[path[-1]]
    elif isinstance(inside, dict) and data.draw(st.booleans()):
        inside[data.draw(st.text(max_size=8))] = copy.deepcopy(inside[path[-1]])
    else:
        inside[path[-1]] = new
    (one / "config.json").write_text(json.dumps(config))
    loads_or_is_refused(one)


@FUZZ
@given(raw=st.binary(max_size=200))
def test_any_bytes_as_config_are_refused(one, raw):
    (one / "config.json").write_bytes(raw)
    refuse(one, "config.json")


@FUZZ
@given(data=st.data(), new=JSON)
def test_any_value_anywhere_in_the_index_is_loaded_or_refused(shards, good, data, new):
    index = json.loads((good / "shards" / INDEX).read_text())
    path = data.draw(st.sampled_from([p for p in places(index) if p]))
    inside = index
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = new
    (shards / INDEX).write_text(json.dumps(index))
    record(shards)
    loads_or_is_refused(shards)


@FUZZ
@given(data=st.data(), new=JSON)
def test_any_value_anywhere_in_the_header_of_the_weights_is_loaded_or_refused(one, good, data, new):
    raw = (good / "one" / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    path = data.draw(st.sampled_from([p for p in places(header) if p]))
    inside = header
    for key in path[:-1]:
        inside = inside[key]
    dtypes = st.sampled_from(["F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", "U16"])
    inside[path[-1]] = data.draw(dtypes) if path[-1] == "dtype" and data.draw(st.booleans()) else new
    text = json.dumps(header).encode()
    (one / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    record(one)
    loads_or_is_refused(one)


@FUZZ
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 3000))
def test_any_byte_in_the_header_of_the_weights_is_loaded_or_refused(one, good, at, byte, cut):
    raw = bytearray((good / "one" / WEIGHTS).read_bytes())
    raw[at] = byte
    (one / WEIGHTS).write_bytes(raw[:cut])
    record(one)
    loads_or_is_refused(one)
