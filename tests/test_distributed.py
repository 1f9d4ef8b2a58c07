"""Several processes quantize one model: the same bytes for every number of them, and one that fails stops all."""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import save_file
from torch import nn

# One process that imports, and becomes several, as torchrun would start them.
FORKED = """
import os, socket, sys, time
from pathlib import Path
import torch
from torch import nn
import qgraft
from qgraft.quantizer import distributed, units

distributed.LINGER_SECONDS = 120  # a busy machine may let one of them start long after the others
folder, base, fails = sys.argv[1:]
recipe = qgraft.Recipe.from_dict({"scheme": {"name": "w4a8_svd", "rank": 8}})

def work(rank, out):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64 + 8 * i, 72 + 8 * i) for i in range(9)))
    if fails:
        real, failed = units._quantize, Path(folder, "failed")
        def meddled(*args):
            if rank == int(fails):
                failed.touch()
                raise RuntimeError("no space left")
            while not failed.exists():  # so that it gets something to do
                time.sleep(0.01)
            time.sleep(0.3)  # what it makes is written when the other is long on its way out
            return real(*args)
        units._quantize = meddled
    qgraft.quantize_files(folder, recipe, out, model=model, shard_bytes=9000, progress=False, say=print)

def start(world, out):
    children = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                work(rank, out)
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__} of rank {rank}: {error}")
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

for world in (3,) if fails else (1, 2, 4):
    print(world, start(world, f"{base}/of{world}"), flush=True)
"""


def forked(folder, base, fails="") -> str:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(folder), str(base), fails]
    environment = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    model = nn.Sequential(*(nn.Linear(64 + 8 * i, 72 + 8 * i) for i in range(9)))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def weights(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "report.json"}


def test_one_two_and_four_processes_write_the_same_bytes(folder, tmp_path):
    told = forked(folder, tmp_path)
    assert "2 processes share 9 parts" in told and "4 [0, 0, 0, 0]" in told, told
    one = weights(tmp_path / "of1")
    assert len(one) > 4 and weights(tmp_path / "of2") == one and weights(tmp_path / "of4") == one
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "of1", "of2", "of4"]


@pytest.mark.parametrize("fails", [0, 1])
def test_a_process_that_fails_stops_all_with_its_message(fails, folder, tmp_path):
    told = forked(folder, tmp_path, str(fails))
    assert "3 [1, 1, 1]" in told
    for rank in {0, 1, 2} - {fails}:
        assert f"QuantizeError of rank {rank}: rank {rank} stops: " in told, told
    assert told.count(f"rank {fails} failed: layer '") >= 1 and "RuntimeError: no space left" in told
    assert not (tmp_path / "of3").exists()


def torchrun(folder, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "qgraft", "quantize", "model", "-r", "w4a16", "--out", out]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_torchrun_starts_the_command_and_ends_with_the_message_of_a_process_that_fails(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "vocab_size": 80}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    done = torchrun(tmp_path, "out")
    assert done.returncode == 0 and "2 processes share 7 parts" in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("Plan of recipe w4a16") == 1 and done.stderr.count("saved out") == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["layers"]) == 7
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    done = torchrun(tmp_path, "failed")
    assert done.returncode != 0 and not (tmp_path / "failed").exists()
    assert "layer 'model.layers.0.mlp.up_proj' (w4a16, 80 x 64)" in done.stderr and "NaN" in done.stderr
    # The other process, too, says whose fault it was, unless it was so late that torchrun ended it.
    stopped = r"rank [01] stops: rank [01] failed: layer 'model\.layers\.0\.mlp\.up_proj'|closing signal SIGTERM"
    assert re.search(stopped, done.stderr), done.stderr[-3000:]
