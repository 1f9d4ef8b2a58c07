"""Quantized diffusion models through diffusers' own `save_pretrained` and `from_pretrained`.

    Quantizer(pipe.transformer).quantize("w8a16")            in place; the pipeline goes on as it is
    pipe.save_pretrained("folder")
    pipe = DiffusionPipeline.from_pretrained("folder")       after `import qgraft`; equal to the last bit

config.json of the component then has our `quantization_config` (see quantizer/checkpoint.py, without checksums). A
diffusers without qgraft stops at its quant_method, which it does not know. Needs diffusers 0.42 or later.
"""

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..checkpoint import GUARD, check_config, describe, join
from ..errors import CheckpointError, some
from ..loading import NAMED_FLOATS, fit, put, tie_codes
from ..weight_files import aligned
from .attached import AttachedQuantizer


class Method(str, Enum):
    """diffusers asks a quant_method for its `value`."""

    QGRAFT = "qgraft"


METHOD = Method.QGRAFT


class QGraftConfig(QuantizationConfigMixin):
    """What was done to a model, as its config.json says.

    diffusers quantizes nothing while it loads for us: load the float model and give it to a Quantizer.
    Raises CheckpointError for a record that is incomplete, or of another version.
    """

    def __init__(self, **recorded: Any):
        recorded = check_config({**recorded, "quant_method": METHOD.value}, "quantization_config")
        self.__dict__.update(recorded, quant_method=METHOD)

    def __repr__(self) -> str:  # the mixin's own wants a method that it does not have
        return f"QGraftConfig({len(self.layers)} layers)"


class QGraftQuantizer(AttachedQuantizer, DiffusersQuantizer):
    """Loads and saves the layers of ours in a diffusers model."""

    use_keep_in_fp32_modules = True  # of Wan's and others': what `torch_dtype` leaves in float32

    def __init__(self, quantization_config: QGraftConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError(
                "diffusers cannot quantize by a qgraft config while it loads: load the float model, and call "
                "qgraft.Quantizer(model).quantize(recipe)"
            )
        self.dtype: torch.dtype | None = None  # of the floats; None: of each as it was
        self.files: list[Path] = []
        self.own: set[str] = set()  # names of the tensors that come as the files have them, while a model is loaded

    @staticmethod
    def write_config(model: nn.Module) -> QGraftConfig:
        config = QGraftConfig(**describe(model, {}))
        model.register_to_config(quantization_config=config)
        return config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if "disk" in (device_map.values() if isinstance(device_map, dict) else ()):
            raise CheckpointError("device_map: quantized layers are not offloaded to disk; use cpu or a device")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The type in which the model is built; diffusers would make all of it float32 by default."""
        self.dtype = torch_dtype
        names = Counter(str(entry.get("dtype")) for entry in self.quantization_config.layers.values())
        most = next(iter(names.most_common(1)), ("", 0))[0]
        return NAMED_FLOATS.get(most) if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names in the files, without the guards; called before the model is looked at."""
        self.files = [Path(file) for file in checkpoint_files]
        strange = [str(file) for file in self.files if file.suffix != ".safetensors"]
        if strange:
            raise CheckpointError(f"{some(strange)}: quantized weights are read from safetensors only")
        guards = {join(name, GUARD) for name in self.quantization_config.layers}
        return [name for name in loaded_keys if name not in guards]

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Iterable[str] = (), **_: Any
    ) -> None:
        """Replace the layers of the skeleton, which is on meta, by empty ones of ours.

        Raises CheckpointError, before any weight is read, where files, config and model do not fit to the last tensor.
        """
        _, sites, layers = fit(self.files[0].parent, model, self.quantization_config.to_dict(), self.files)
        put(model, sites, layers, {})
        if self.dtype is None:
            self.own = set(model.state_dict())
            return
        kept = set(keep_in_fp32_modules)
        for name, layer in layers.items():
            layer.to(self.dtype if kept.isdisjoint(name.split(".")) else torch.float32)
            self.own |= {join(name, leaf) for leaf, buffer in layer._buffers.items() if buffer is not None}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *_: Any, **__: Any
    ) -> bool:
        return param_name in self.own

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict,
        *_: Any,
        **__: Any,
    ) -> None:
        """Put a tensor in its place as the file has it; diffusers has cast `param_value` to another type."""
        path, _, leaf = param_name.rpartition(".")
        module, tensor = model.get_submodule(path), aligned(state_dict[param_name].to(target_device))
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, module._parameters[leaf].requires_grad)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        state = model.state_dict()
        left = [name for name in self.own if state[name].is_meta]
        if left:
            raise CheckpointError(f"{self.files[0].parent}: diffusers did not load {some(sorted(left))}")
        self.own = set()
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = aligned(parameter.data)
        tie_codes(m for m in model.modules() if hasattr(m, "tied_to"))
        model.is_quantized = False  # to diffusers it means that the model cannot be cast, and this one can
        self.attach_to(model, self)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the state, and a guard for each layer (see quantizer/checkpoint.py)."""
        if not safe_serialization:
            raise CheckpointError("quantized weights are written as safetensors only: safe_serialization=True")
        homes = {name.rpartition(".")[0] for name in state_dict}
        moved = [name for name in self.quantization_config.layers if name not in homes]
        if moved:  # saved so, the folder could not be loaded
            raise CheckpointError(
                f"not in the model under the name that the config has: {some(moved)}. Take adapters off first: "
                "save_lora_adapter(...), then unload_lora()"
            )
        guard = torch.empty(0, dtype=torch.int8)
        return state_dict | {join(name, GUARD): guard.clone() for name in self.quantization_config.layers}, {}

    @property
    def is_serializable(self) -> bool:
        return True
