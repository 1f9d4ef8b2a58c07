"""Folders of others with anything in them: what is no checkpoint is refused in words, and the model left as it was."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgraft import load
from qgraft.quantizer.errors import CheckpointError

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
from forging import damage  # noqa: E402
from test_compressed_tensors import written_by_the_package  # noqa: E402
from test_gptq_awq import awq, checkpoint, gptq  # noqa: E402

VALUES = [
    None, -1, 0, 1, 3, 64, -64, 2**40, -(2**40), "x", "", "../x", "re:(", "re:.*", [], {}, [1], [None], {"a": 1}, 1.5,
    True, False, float("nan"),
]  # fmt: skip
HALF = torch.float16
FOLDERS = ("packed", "integers", "gptq", "awq")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    row = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    static = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False}
    written_by_the_package(root / "packed", group)
    written_by_the_package(root / "integers", row, activations=static, form="int-quantized")
    four = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq"}
    checkpoint(root / "gptq", four, lambda k, n: gptq(k, n, 4, 32, False, True, True, HALF))
    gemm = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    checkpoint(root / "awq", gemm, lambda k, n: awq(k, n, 32, HALF))
    for name in FOLDERS:
        load(root / name)
    return root


def loads_or_is_refused(folder, good):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**json.loads((good / "config.json").read_text())))
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    try:
        load(folder, model=model)
    except CheckpointError:
        assert before == {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("name", FOLDERS)
def test_any_value_anywhere_in_the_quantization_config_is_read_or_refused(name, folders, tmp_path):
    good = folders / name
    config = json.loads((good / "config.json").read_text())
    spots = [p for p in places(config) if len(p) > 1 and p[0] == "quantization_config"]
    shutil.copytree(good, tmp_path / "bad")
    for _ in range(40):
        damaged, path = copy.deepcopy(config), random.choice(spots)
        inside = damaged
        for key in path[:-1]:
            inside = inside[key]
        if random.random() < 0.1:
            del inside[path[-1]]
        else:
            inside[path[-1]] = random.choice(VALUES)
        (tmp_path / "bad" / "config.json").write_text(json.dumps(damaged))
        print(path, inside)  # shown if this one fails
        loads_or_is_refused(tmp_path / "bad", good)


@pytest.mark.parametrize("name", FOLDERS)
def test_any_damage_of_a_tensor_is_read_or_refused(name, folders, tmp_path):
    good = folders / name
    tensors = load_file(good / "model.safetensors")
    (tmp_path / "bad").mkdir()
    shutil.copy(good / "config.json", tmp_path / "bad")
    for _ in range(25):
        damaged, leaf = dict(tensors), random.choice([t for t in tensors if "_proj" in t])
        if random.random() < 0.2:
            del damaged[leaf]
        else:
            damaged[leaf] = damage(tensors[leaf])
        save_file(damaged, tmp_path / "bad" / "model.safetensors")
        print(leaf, damaged.get(leaf))
        loads_or_is_refused(tmp_path / "bad", good)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("ignore",), 3, "quantization_config: ignore: input should be a valid list, not 3"),
        (("config_groups", "group_0", "weights", "num_bits"), "4", "config_groups.group_0.weights.num_bits: .*integer"),
        (("config_groups", "group_0", "targets"), ["re:("], "'re:\\(' is no regular expression"),
    ],
)
def test_the_entry_is_named(place, value, message, folders, tmp_path):
    config = json.loads((folders / "packed" / "config.json").read_text())
    inside = config["quantization_config"]
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    shutil.copytree(folders / "packed", tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "bad")
