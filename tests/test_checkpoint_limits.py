"""Headers that would eat the memory, shards cut short, and disks that fill up while a checkpoint is written."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

from qgraft import Quantizer, Recipe, load, save
from qgraft.quantizer import CheckpointError

RECIPE = Recipe.from_dict({"scheme": "w8a32", "min_features": 1})
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def net(width=23):
    return nn.Sequential(nn.Linear(19, width), nn.ReLU(), nn.Linear(width, 19))


def quantized(width=23):
    return Quantizer(net(width)).quantize(RECIPE, progress=False)


@pytest.fixture
def folder(tmp_path):
    save(quantized(), tmp_path / "out")
    return tmp_path / "out"


def record(folder, names=None):
    """Checksums of the files as they are now: they protect from accidents, and these are none."""
    data = json.loads((folder / "config.json").read_text())
    files = data["quantization_config"]["files"]
    for name in names or files:
        raw = (folder / name).read_bytes()
        files[name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "config.json").write_text(json.dumps(data))


def refuse(folder, words):
    model = net()
    before = [(id(m), t.clone()) for m in model for t in m.parameters()]
    with pytest.raises(CheckpointError, match=words):
        load(folder, model=model)
    after = [(id(m), t) for m in model for t in m.parameters()]
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(before, after, strict=True))


# -- headers ----------


def with_header(header, claims=None, data=b"\0" * 64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claims is None else claims) + raw + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
BOMBS = {
    "a length of 8 EiB": with_header({}, claims=2**63),
    "a length of 1 TiB": with_header({}, claims=2**40),
    "a length one byte beyond the file": with_header({}, claims=2 + 64 + 1),
    "the largest length": with_header({}, claims=2**64 - 1),
    "lists in lists": with_header(b"[" * 200_000),
    "mappings in mappings": with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "nested metadata": with_header(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
    "more weights than there are atoms": with_header({"0.scale": {**ENTRY, "shape": [2**40, 2**40]}}),
    "more weights than the file holds": with_header({"0.scale": {**ENTRY, "shape": [2**33]}}),
    "offsets beyond the file": with_header({"0.scale": {**ENTRY, "data_offsets": [2**40, 2**40 + 16]}}),
    "offsets that run backwards": with_header({"0.scale": {**ENTRY, "data_offsets": [16, 0]}}),
    "two tensors in one place": with_header({"0.scale": ENTRY, "2.scale": ENTRY}, data=b"\0" * 16),
    "a hole": with_header({"0.scale": {**ENTRY, "data_offsets": [8, 24]}}, data=b"\0" * 24),
    "negative sizes": with_header({"0.scale": {**ENTRY, "shape": [-4]}}),
    "no JSON": with_header(b"\xff\xfe" * 40),
    "an empty file": b"",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_that_lies_is_refused_before_memory_is_asked_for(folder, kind):
    (folder / WEIGHTS).write_bytes(BOMBS[kind])
    record(folder)
    refuse(folder, "no readable safetensors file")


def test_a_header_with_one_name_twice_does_not_load(folder):
    entry = json.dumps(ENTRY)
    (folder / WEIGHTS).write_bytes(with_header(f'{{"0.scale":{entry},"0.scale":{entry}}}'.encode(), data=b"\0" * 16))
    record(folder)
    refuse(folder, "no readable safetensors file|tensors are missing")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map":' * 50_000, "9" * 5000, '{"weight_map": 3}', ""])
def test_an_index_that_is_a_bomb_or_none_is_refused(tmp_path, text):
    save(quantized(), tmp_path, shard_bytes=300)
    (tmp_path / INDEX).write_text(text)
    record(tmp_path)
    refuse(tmp_path, "cannot be read|has no weight_map|holds no JSON object")


@pytest.mark.parametrize("recorded", [True, False], ids=["checksums", "no checksums"])
def test_each_shard_that_is_cut_short_is_named(tmp_path, recorded):
    save(quantized(), tmp_path / "whole", shard_bytes=300)
    shards = sorted((tmp_path / "whole").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        copied = tmp_path / shard.stem
        shutil.copytree(tmp_path / "whole", copied)
        (copied / shard.name).write_bytes(shard.read_bytes()[:-1])
        if not recorded:  # as transformers writes it
            data = json.loads((copied / "config.json").read_text())
            data["quantization_config"]["files"] = {}
            (copied / "config.json").write_text(json.dumps(data))
        refuse(copied, rf"{shard.name}: (\d+ bytes where|no readable safetensors file)")


def test_a_folder_without_checksums_follows_its_index_and_no_further(tmp_path):
    save(model := quantized(), tmp_path, shard_bytes=300)
    data = json.loads((tmp_path / "config.json").read_text())
    data["quantization_config"]["files"] = {}
    (tmp_path / "config.json").write_text(json.dumps(data))
    x = torch.randn(3, 19)
    assert torch.equal(load(tmp_path, model=net())(x), model(x))
    index = json.loads((tmp_path / INDEX).read_text())
    for name in ("../model.safetensors", "/etc/passwd", "model.bin"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "0.scale": name}}))
        refuse(tmp_path, "does not write, refused")
    (tmp_path / INDEX).unlink()
    refuse(tmp_path, "model.safetensors: missing")


# -- full disks ----------


def fills_up(path, old, small, large):
    """Saving `large` fails for want of room. The old folder stays whole, nothing else stays, and the room is free."""
    if old:
        save(small, path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises((OSError, CheckpointError)) as caught:
        save(large, path)
    assert "model" in str(caught.value) and ("space" in str(caught.value) or "large" in str(caught.value))
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in path.parent.iterdir()] == (["out"] if old else [])
    save(small, path)
    x = torch.randn(2, 19)
    assert torch.equal(load(path, model=net())(x), small(x))


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, old):
    """A real one, of 256 kB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "qgraft-test", str(disk)]
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk; the next test limits the size of files instead")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the next test limits the size of files instead")
    try:
        fills_up(disk / "out", old, quantized(), quantized(width=20_000))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("old", [False, True])
def test_a_limit_on_the_size_of_files_leaves_what_was_there(tmp_path, old):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    small, large = quantized(), quantized(width=20_000)
    place = tmp_path / "place"
    place.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        fills_up(place / "out", old, small, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
