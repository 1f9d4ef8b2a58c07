"""LoRA on quantized layers, through peft: adapters in float, trained over codes that stay as they are.

    from peft import LoraConfig, PeftModel, get_peft_model
    config = on_quantized(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)       # train, then model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter", config=on_quantized(LoraConfig.from_pretrained("adapter")))

peft (0.17 or later) picks the class of an adapter by the class of the layer below it; `on_quantized` tells the config
which class that is for ours. peft does not save that with the adapter, hence the `config=` when one is loaded.

The other way round, what a quantized layer has beside its codes is a LoRA already: the low-rank branch of SVDQuant.

    base = split_off_branches(model, "adapter")     the model without its branches, which peft reads from the folder
    qgraft.export(base, "base")                     int4 codes that transformers and vLLM know; or base.save_pretrained
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", ...), "adapter")    stock; no qgraft needed
"""

import copy
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

from ...layers import QuantLinear, SVDQW4A4Linear, W4A16Linear
from ..errors import CheckpointError
from ..surgery import find_sites, replace
from .clients import detach

# The ways to begin that leave the weight below as it is; the others take a part out of it.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Kinds of LoRA that want the float weight, or its norm, at each step.
VARIANTS = ("use_dora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "kasa_config")


def on_quantized(config: LoraConfig) -> LoraConfig:
    """The same config, which now also knows quantized layers.

    Raises ValueError for `target_modules="all-linear"` (peft would look for float layers only), and for kinds of
    LoRA that change or want the float weight.
    """
    if config.target_modules == "all-linear":
        raise ValueError(
            'target_modules="all-linear" means float layers to peft and would pass the quantized ones by: name them, '
            "[name for name, module in model.named_modules() if isinstance(module, qgraft.QuantLinear)]"
        )
    if config.init_lora_weights not in STARTS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} takes a part out of the float weight, and there is none: "
            f"use one of {', '.join(map(repr, STARTS))}"
        )
    wanted = [name for name in VARIANTS if getattr(config, name, None)]
    if wanted:
        raise ValueError(f"{', '.join(wanted)}: needs the float weight, and there is none; use plain LoRA")
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


class LoraQuantLinear(Linear):
    """peft's adapter over a quantized layer: y = layer(x) + scaling * x A^T B^T. It cannot be merged."""

    def __init__(self, base_layer: QuantLinear, adapter_name: str, *args: Any, **kwargs: Any):
        if getattr(base_layer, "stride", None) is not None:
            raise ValueError(
                f"{base_layer} is a 1x1 convolution, and LoRA on quantized ones is not there: take it out of "
                "target_modules, or leave it in float by a rule with `skip:`"
            )
        with warnings.catch_warnings():
            # peft asks a layer that it does not know for in_features and out_features, which ours has.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raises TypeError: codes have no room for an adapter."""
        raise TypeError(
            f"an adapter cannot be merged into {type(self.get_base_layer()).__name__}: rounding the sum to its codes "
            "would lose most of what was trained. Keep the adapter beside the quantized model, or merge it into the "
            "float model and quantize that"
        )


def split_off_branches(model: nn.Module, folder: str | Path, base: str = "") -> nn.Module:
    """Write the low-rank branches as a LoRA adapter of peft, and return the model without them, a copy.

    folder: gets adapter_config.json and adapter_model.safetensors, numbers and types as they are in the layers. Names
    are those of the modules of `model`, under `base_model.model.` as peft has them.
    base: for the config's `base_model_name_or_path`: where the returned model is going to be found.
    In the copy a layer keeps its class and its codes, with rank 0, if it neither smooths nor rotates: what
    `qgraft.export` writes packed. Else a float module with the residual takes its place, of the kind that was there
    before and in the layer's type, and its activations are no longer rounded. The two together are the weight of the
    layer, in float32 to its last bits.
    Raises CheckpointError if no layer has a branch, or the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is no empty folder; give a new one")
    branches = {name: m for name, m in model.named_modules() if getattr(m, "proj_up", None) is not None}
    branches = {name: m for name, m in branches.items() if isinstance(m, (SVDQW4A4Linear, W4A16Linear))}
    if not branches:
        raise CheckpointError("no layer of the model has a low-rank branch: quantize with a rank, such as by w4a8_svd")
    if "" in branches:
        raise CheckpointError("the model is a single layer: peft puts adapters into the layers of a model")
    ranks = {name: layer.scheme.rank for name, layer in branches.items()}
    tensors = {}
    for name, layer in branches.items():
        home = f"base_model.model.{name}"
        pixels = () if layer.stride is None else (1, 1)  # over a 1x1 convolution the adapter is two of them
        tensors[f"{home}.lora_A.weight"] = layer.proj_down.t().contiguous().unflatten(1, (-1, *pixels))  # (R, K)
        tensors[f"{home}.lora_B.weight"] = layer.proj_up.contiguous().unflatten(1, (-1, *pixels))  # (N, R)
    most = max(ranks.values())
    patterns = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,  # y = base(x) + alpha / r * x A^T B^T
        target_modules=_targets(list(branches), [site.name for site in find_sites(model)]),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file({name: t.cpu() for name, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    rest = copy.deepcopy(model)
    swaps = [(site.names, _without_branch(site.module)) for site in find_sites(rest) if site.name in branches]
    rest = replace(rest, *swaps)
    detach(rest)
    return rest


def _targets(names: list[str], linears: Iterable[str]) -> list[str] | str:
    """Full names, or, where peft would find one of them at the end of another layer's, a regular expression."""
    known = set(names)
    if any(other.endswith(f".{name}") for other in linears if other not in known for name in names):
        return "|".join(map(re.escape, names))
    return names


@torch.no_grad()
def _without_branch(layer: SVDQW4A4Linear | W4A16Linear) -> nn.Module:
    n, k, device = layer.out_features, layer.in_features, layer.qweight.device
    scheme = layer.scheme.model_copy(update={"rank": 0})
    rest = type(layer)(k, n, bias=False, scheme=scheme, device=device, dtype=layer.dtype)
    rest._buffers.update({name: b for name, b in layer._buffers.items() if not name.startswith("proj_")})
    rest.stride = layer.stride
    if scheme.rotate or layer.smooth_factor is not None:
        rest = _as_it_was(layer, rest.dequantize().to(layer.dtype))
    rest.bias = layer.bias
    return rest.train(layer.training)


def _as_it_was(layer: QuantLinear, weight: Tensor) -> nn.Module:
    """A float module of the kind that `layer` replaced, with this weight (N, K) and no bias yet."""
    n, k = weight.shape
    if layer.stride is not None:
        module, weight = nn.Conv2d(k, n, 1, layer.stride, bias=False, device="meta"), weight[..., None, None]
    elif hasattr(layer, "nf"):  # of transformers' Conv1D; `replace` carries over what a module has of its own
        from transformers.pytorch_utils import Conv1D

        module, weight = Conv1D(n, k), weight.t().contiguous()
    else:
        module = nn.Linear(k, n, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module
