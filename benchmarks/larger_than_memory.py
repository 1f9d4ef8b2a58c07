"""Quantize a language model with calibration data in less memory than it takes to load it.

    python -m qgraft.benchmarks.larger_than_memory --gib 1.5 --limit-gib 0.6

Writes a Llama of random weights, shard by shard. Then two processes get the same limit (RLIMIT_AS, so Linux only): what
they have after their imports, and so much more. The one loads the model, which has to fail; the other quantizes it from
file to file, and tells its peak.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

import qgraft
from qgraft.benchmarks.memory import status
from qgraft.quantizer.interop.huggingface import ModelFolder

WIDTH, MLP, VOCABULARY = 1024, 2816, 1024
SEQUENCES, TOKENS = 8, 128
SHARD_BYTES = 64 << 20
FAILED = 3
# An arena takes 64 MiB of addresses; what is smaller than the threshold keeps glibc from giving back what lies before.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
GIB = 1 << 30


def main(
    gib: Annotated[float, typer.Option(help="Size of the float model.")] = 1.5,
    limit_gib: Annotated[float, typer.Option(help="What a process may have beyond its imports.")] = 0.6,
    recipe: Annotated[str, typer.Option("-r", "--recipe")] = "w4a16",
) -> None:
    """Show that a model that cannot be loaded can be quantized."""
    with tempfile.TemporaryDirectory() as folder:
        blocks, size = write_model(Path(folder) / "model", gib)
        print(
            f"a Llama of {blocks} blocks, {size / GIB:.2f} GiB; limit {limit_gib:.2f} GiB beyond the imports",
            flush=True,
        )
        for step in (load, quantize):
            environment = os.environ | MALLOC
            call = f"from {__spec__.name} import *; limited({step.__name__}, {folder!r}, {limit_gib}, {recipe!r})"
            done = subprocess.run([sys.executable, "-c", call], env=environment)
            if done.returncode != (FAILED if step is load else 0):
                raise SystemExit(f"{step.__name__}: exit code {done.returncode}")


def write_model(folder: Path, gib: float) -> tuple[int, int]:
    """How many blocks it has, and its bytes; never more than one block in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    each = 4 * (4 * WIDTH**2 + 3 * WIDTH * MLP)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_attention_heads=16, vocab_size=VOCABULARY,
        num_hidden_layers=round(gib * GIB / each), architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(folder)
    shards: dict[str, list[str]] = {}
    for name in state:
        head, _, _ = name.removeprefix("model.layers.").partition(".")
        shards.setdefault(f"model-{head}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {
            n: torch.randn(state[n].shape) / WIDTH**0.5 if state[n].ndim > 1 else torch.ones(WIDTH) for n in names
        }
        save_file(tensors, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return config.num_hidden_layers, sum(4 * t.numel() for t in state.values())


def limited(step, folder: str, gib: float, recipe: str) -> None:
    """One of the two processes."""
    ModelFolder(Path(folder) / "model").skeleton()  # for its imports: some map hundreds of MiB
    before, resident = status("VmSize"), status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (before + int(gib * GIB),) * 2)
    try:
        step(Path(folder), recipe)
    except (MemoryError, RuntimeError, OSError, qgraft.quantizer.QGraftError) as error:
        print(f"{step.__name__}: {type(error).__name__}: {str(error).splitlines()[-1][:200]}")
        raise SystemExit(FAILED) from None
    finally:
        peaks = [status(peak) - was for peak, was in (("VmPeak", before), ("VmHWM", resident))]
        print("{}: peak {:.2f} GiB of addresses, {:.2f} GiB resident".format(step.__name__, *(p / GIB for p in peaks)))


def load(folder: Path, recipe: str) -> None:
    ModelFolder(folder / "model").load()


def quantize(folder: Path, recipe: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(VOCABULARY, (1, TOKENS), generator=generator)} for _ in range(SEQUENCES)]
    qgraft.quantize_files(
        folder / "model",
        recipe,
        folder / "out",
        model=ModelFolder(folder / "model").skeleton(),
        calibration=data,
        shard_bytes=SHARD_BYTES,
    )


if __name__ == "__main__":
    typer.run(main)
