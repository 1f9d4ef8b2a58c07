"""The folder that save writes: a crash never costs the old checkpoint, and files of others are kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qgraft import Quantizer, Recipe, load, save
from qgraft.quantizer import CheckpointError, checkpoint

RECIPE = Recipe.from_dict({"scheme": "w8a32", "min_features": 1})


def net():
    return nn.Sequential(nn.Linear(19, 23), nn.ReLU(), nn.Linear(23, 19))


def quantized():
    return Quantizer(net()).quantize(RECIPE, progress=False)


def is_loaded_from(folder, model):
    loaded = load(folder, model=net()).state_dict()
    return all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


def snapshot(folder):
    """Every path below, with the bytes of files; links as links."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


STEPS = {
    "a weight file": (checkpoint, "save_file"),
    "json": (checkpoint, "write_json"),
    "checksums": (checkpoint, "_fingerprint"),
    "report": (checkpoint.Report, "save"),
    "copies of files": (shutil, "copy2"),
    "copies of folders": (shutil, "copytree"),
    "rights": (Path, "chmod"),
    "renames": (os, "replace"),
}


@pytest.mark.parametrize("old", ["nothing", "an empty folder", "a checkpoint"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_leaves_the_old_state_whole_and_nothing_behind(tmp_path, monkeypatch, step, error, old):
    target, note = tmp_path / "place" / "out", tmp_path / "note.md"
    target.parent.mkdir()
    note.write_text("to be copied")
    if old == "an empty folder":
        target.mkdir()
    if old == "a checkpoint":
        save(quantized(), target, shard_bytes=300)
        (target / "tokenizer.json").write_text("{}")
        (target / "more").mkdir()
        (target / "more" / "file").write_text("")
    before, model = snapshot(target.parent), quantized()
    owner, attribute = STEPS[step]
    original, crashes = getattr(owner, attribute), 0
    while True:
        calls = []

        def run(*args, _calls=calls, _at=crashes + 1, **kw):
            _calls.append(1)
            if len(_calls) == _at:
                raise error
            return original(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, run)
            try:
                save(model, target, shard_bytes=500, extra_files=[note])
            except type(error):
                crashes += 1
            else:
                break  # so many calls of this step there are not
        assert snapshot(target.parent) == before
    assert crashes or (step == "copies of folders" and old != "a checkpoint")
    assert is_loaded_from(target, model)
    assert [p.name for p in target.parent.iterdir()] == ["out"]


KILL = """
import os, sys, torch
from torch import nn
from qgraft import Quantizer, save
model = Quantizer(nn.Sequential(nn.Linear(19, 23), nn.ReLU(), nn.Linear(23, 19))).quantize("w8a32")
replace = os.replace
os.replace = lambda *args: os._exit(9)
save(model, sys.argv[1])
"""


def test_a_process_killed_while_it_saves_leaves_the_old_checkpoint_loadable(tmp_path):
    save(model := quantized(), tmp_path / "out")
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "out")], env=environment)
    assert done.returncode == 9 and is_loaded_from(tmp_path / "out", model)
    save(second := quantized(), tmp_path / "out")
    assert is_loaded_from(tmp_path / "out", second)


def test_saving_over_a_checkpoint_keeps_the_files_of_others_and_drops_its_own_old_ones(tmp_path):
    out = tmp_path / "out"
    save(quantized(), out, shard_bytes=300)
    (out / "tokenizer.json").write_text("{}")
    (out / "adapter.safetensors").write_bytes(b"of somebody else")
    (out / "runs" / "deep").mkdir(parents=True)
    (out / "runs" / "deep" / "log").write_text("log")
    (out / "link").symlink_to("tokenizer.json")
    (out / "broken").symlink_to("nowhere")
    save(model := quantized(), out)
    found = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    ours = {"config.json", "report.json", "model.safetensors"}
    assert found == {*ours, "tokenizer.json", "adapter.safetensors", "runs/deep/log", "link", "broken"}
    assert (out / "link").is_symlink() and (out / "link").read_text() == "{}"
    assert (out / "adapter.safetensors").read_bytes() == b"of somebody else"
    assert is_loaded_from(out, model)


@pytest.mark.parametrize(("old", "new"), [(10_000, 300), (300, 10_000)], ids=["one file by several", "several by one"])
def test_weights_that_no_config_records_are_replaced_like_those_of_save(tmp_path, old, new):
    """As in a folder that transformers wrote. Readers take what is called model.safetensors before an index."""
    out = tmp_path / "out"
    save(quantized(), out, shard_bytes=old)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["files"] = {}
    (out / "config.json").write_text(json.dumps(config))
    save(model := quantized(), out, shard_bytes=new)
    recorded = json.loads((out / "config.json").read_text())["quantization_config"]["files"]
    assert {p.name for p in out.iterdir()} == {*recorded, "config.json", "report.json"}
    assert is_loaded_from(out, model)


def test_extra_files_are_copied_and_never_replace_what_save_writes(tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text("mine")
    save(
        model := quantized(), tmp_path / "out", extra_files=[tmp_path / "tokenizer.json", str(tmp_path / "config.json")]
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
    assert is_loaded_from(tmp_path / "out", model)


@pytest.mark.parametrize("kind", ["file", "folder of others", "checkpoint of others", "damaged config"])
def test_what_is_no_checkpoint_of_ours_is_not_replaced(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("a file")
    else:
        out.mkdir()
        name, text = {
            "folder of others": ("thesis.tex", "ten years"),
            "checkpoint of others": ("config.json", '{"quantization_config": {"quant_method": "gptq"}}'),
            "damaged config": ("config.json", "{"),
        }[kind]
        (out / name).write_text(text)
    before = snapshot(tmp_path), out.read_bytes() if kind == "file" else None
    with pytest.raises(CheckpointError, match="out: exists and"):
        save(quantized(), out)
    assert (snapshot(tmp_path), out.read_bytes() if kind == "file" else None) == before


def test_missing_parents_are_made_and_relative_and_linked_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(first := quantized(), "a/b/c")
    assert is_loaded_from("a/b/c", first)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "c")
    save(second := quantized(), "link/")
    assert (tmp_path / "link").is_symlink() and is_loaded_from("a/b/c", second)


def test_the_folder_can_be_read_by_others_as_any_folder(tmp_path):
    save(quantized(), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o755 == 0o755
