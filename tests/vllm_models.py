"""vLLM's Llama on a CPU, with folders read by its own loaders. Imported by tests that have checked that vLLM is there.

Its kernels need a GPU or its own build for CPUs; its parsers, layers and loaders are Python.
"""

import os

import torch
import transformers
from safetensors.torch import load_file

os.environ["VLLM_BATCH_INVARIANT"] = "1"  # the path without kernels that want their own packing

import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()
from contextlib import contextmanager  # noqa: E402

from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.models.llama import LlamaForCausalLM  # noqa: E402

from qgraft import Quantizer, Recipe  # noqa: E402

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
HEAD = {"match": "lm_head", "skip": "head"}


@contextmanager
def world(store, rank=0, size=1):
    """One of the processes of vLLM's tensor parallelism; store: a file that all of them see."""
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(size, rank, f"file://{store}", rank, "gloo")
        initialize_model_parallel(size, 1)
        yield
        cleanup_dist_env_and_memory()


def llama(**changes):
    config = transformers.LlamaConfig(**{
        "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    } | changes)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def quantized(recipe, **changes):
    recipe = Recipe.from_dict(recipe) if isinstance(recipe, dict) else recipe
    data = [torch.randint(0, 128, (2, 30)) for _ in range(3)]
    return Quantizer(llama(**changes)).quantize(recipe, calibration=data, progress=False)


def read_by_vllm(folder):
    """vLLM's model of the folder, filled by its own loaders; every parameter of it has to be in the files."""
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64
        ),
        device_config=DeviceConfig(device="cpu"),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with set_current_vllm_config(config):
            model = LlamaForCausalLM(vllm_config=config)
            loaded = model.load_weights(load_file(folder / "model.safetensors").items())
    finally:
        torch.set_default_dtype(before)
    # Made from the weights afterwards, and the scales of the cache of keys and values, which nobody quantizes here.
    others = {n for n, _ in model.named_parameters() if n.endswith("azp_adj") or ".self_attn.attn." in n}
    assert not {n for n, _ in model.named_parameters()} - others - loaded
    return model
