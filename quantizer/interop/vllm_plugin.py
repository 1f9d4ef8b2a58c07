"""A plugin for vLLM: folders of `qgraft.save`, low-rank branch, smoothing and rotation included, in vLLM's models.

vLLM loads it by itself where qgraft is installed beside it (entry point `vllm.general_plugins`). Follows vLLM's own
interface for quantization out of its tree (`register_quantization_config`, 0.33).

A linear layer of vLLM may be several of ours: q, k and v, or gate and up, whose smoothing and branch are each its own.
It holds them side by side, and joins what they give. What vLLM's loaders bring goes into whole layers, of which a
process then keeps its part: the codes of one device, sliced as in layers/sharding.py. A row-parallel layer that rounds
activations with one scale a token takes the scale of what it sees of the token.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ...layers import QuantLinear, sharding
from ..checkpoint import GUARD, check_config, join
from ..errors import CheckpointError
from ..loading import build_layer

# What loaders call the parts of a fused layer, in their order.
SHARDS: dict[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}
TURING = 75
HERE = Path()  # vLLM does not say which folder it reads


class VLLMConfig(QuantizationConfig):
    """What stands in `quantization_config` of a folder of ours. Raises CheckpointError for what cannot be served."""

    def __init__(self, entries: dict[str, dict]):
        super().__init__()
        self.entries = entries

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VLLMConfig":
        config = check_config(config, "config.json")
        if config["experts"]:
            raise CheckpointError(f"split experts ({next(iter(config['experts']))}, ...) are not served by vLLM yet")
        shared = [name for name in config["tied"] if name.rpartition(".")[0] in config["layers"]]
        if shared:  # a float head that is the embedding is vLLM's own affair
            raise CheckpointError(f"layers that share codes ({shared[0]}, ...) are not served by vLLM yet")
        return cls(config["layers"])

    def get_name(self) -> str:
        return "qgraft"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return TURING

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        home, _, leaf = prefix.rpartition(".")
        names = [join(home, part) if home else part for part in self.packed_modules_mapping.get(leaf, [leaf])]
        here = [name for name in names if name in self.entries]
        if not here:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, VocabParallelEmbedding):
            raise CheckpointError(
                f"{prefix}: vLLM serves heads and embeddings in float; leave it out by a `skip:` rule"
            )
        if not isinstance(layer, LinearBase):
            raise CheckpointError(f"{prefix}: vLLM makes a {type(layer).__name__} of it, which is no linear layer")
        if len(here) < len(names):
            left = ", ".join(sorted(set(names) - set(here)))
            raise CheckpointError(f"{prefix}: vLLM makes one layer of {', '.join(names)}, and {left} is not quantized")
        return VLLMLinearMethod([(name, self.entries[name]) for name in names])


class VLLMLinearMethod(LinearMethodBase):
    """Makes, fills and runs the layers of ours in one of vLLM's. entries: name and entry of each, in vLLM's order."""

    def __init__(self, entries: list[tuple[str, dict]]):
        self.entries = entries

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        device = torch.empty(0).device
        parts = [build_layer(HERE, name, {**entry, "bias": False}) for name, entry in self.entries]
        for (name, _), part, size in zip(self.entries, parts, output_partition_sizes, strict=True):
            _fits(name, part, input_size, size)
        layer.qgraft_parts = nn.ModuleList(part.to_empty(device=device) for part in parts)
        layer.qgraft_sizes = input_size_per_partition, output_partition_sizes
        layer.qgraft_waiting = {(i, leaf) for i, part in enumerate(parts) for leaf in part.state_dict()}
        # A place for each name that the loaders will look for; the tensors are those of the parts.
        for leaf in sorted({GUARD, *(leaf for _, leaf in layer.qgraft_waiting)}):
            place = nn.Parameter(torch.empty(0), requires_grad=False)
            place.weight_loader = _Loader(layer, leaf)
            layer.register_parameter(leaf, place)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.qgraft_waiting:
            index, leaf = min(layer.qgraft_waiting)
            raise CheckpointError(f"{join(self.entries[index][0], leaf)!r} is missing in the files")
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if isinstance(getattr(parameter, "weight_loader", None), _Loader):
                delattr(layer, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [part(x) for part in layer.qgraft_parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


class _Loader:
    """Puts one tensor of the files into the layer that it is of, and cuts that layer once it is complete."""

    def __init__(self, layer: nn.Module, leaf: str):
        self.layer, self.leaf = layer, leaf

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        layer, index = self.layer, SHARDS.get(shard, shard)
        if self.leaf == GUARD:
            if loaded.numel():
                raise CheckpointError(f"{layer.prefix}.{GUARD}: a float weight, where the config says it is quantized")
            return
        part = layer.qgraft_parts[index]
        own = part.state_dict().get(self.leaf)
        if own is None or own.shape != loaded.shape:
            shape = None if own is None else tuple(own.shape)
            raise CheckpointError(f"{layer.prefix}.{self.leaf}: has shape {tuple(loaded.shape)}, {shape} is expected")
        part._buffers[self.leaf] = loaded.to(own.device, own.dtype, copy=True)
        layer.qgraft_waiting.discard((index, self.leaf))
        if not any(i == index for i, _ in layer.qgraft_waiting):
            _keep_own(part, layer.qgraft_sizes[0], layer.qgraft_sizes[1][index], layer.tp_rank, layer.tp_size)


def _fits(name: str, part: QuantLinear, inputs: int, outputs: int) -> None:
    if part.in_features != inputs or part.out_features % outputs:
        raise CheckpointError(
            f"{name}: is {part.out_features} x {part.in_features}, which gives vLLM's layer of {inputs} inputs no "
            f"equal parts of {outputs} outputs"
        )


def _keep_own(part: QuantLinear, inputs: int, outputs: int, rank: int, ranks: int) -> None:
    """Of a whole layer, this process's part; k and v may be the same in several processes."""
    if outputs < part.out_features:
        count = part.out_features // outputs
        _refuse(sharding.why_not_columns(part, count))
        sharding.columns(part, rank * count // ranks, count)
    if inputs < part.in_features:
        _refuse(sharding.why_not_rows(part, ranks))
        sharding.rows(part, rank, ranks, whole_token=False)


def _refuse(why: str) -> None:
    if why:
        raise CheckpointError(f"tensor parallel: {why}")


def register() -> None:
    """Make vLLM know `quant_method: qgraft`; what its entry point calls, in each of its processes."""
    register_quantization_config("qgraft")(VLLMConfig)
