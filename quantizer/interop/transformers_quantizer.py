"""What transformers calls while it loads and saves a model that is quantized by us, or is to be.

Written for transformers 4.57 and 5.x; where the two differ, the method says which of them calls it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.quantizers.base import HfQuantizer

from ...layers import QuantLayer
from ..checkpoint import contents, describe, quantized_layers
from ..errors import CheckpointError
from .attached import AttachedQuantizer
from .transformers_config import QGraftConfig
from .transformers_load import Loading
from .transformers_quantize import QuantizeOp, QuantizingWhileLoading

IS_V5 = hasattr(HfQuantizer, "get_quantize_ops")


class QGraftHfQuantizer(AttachedQuantizer, HfQuantizer):
    """Loads what `qgraft.save` or `save_pretrained` wrote, or quantizes a float model while it is loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: QGraftConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.work: Loading | QuantizingWhileLoading | None = None  # while a model is loaded

    @staticmethod
    def write_config(model: nn.Module) -> QGraftConfig:
        _set_config(model, {})
        return model.config.quantization_config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise where the config does not go with the model, before any weight is read."""
        if self.pre_quantized and not self.quantization_config.is_record:
            raise CheckpointError(
                "config.json holds a recipe in its quantization_config, and nothing about layers: the weights are "
                "not quantized. Take it out, and give it as from_pretrained(..., quantization_config=...)"
            )
        if not self.pre_quantized and self.quantization_config.is_record:
            raise CheckpointError(
                "quantization_config= describes a model that is quantized, and this one is not; give a recipe"
            )
        if "disk" in (device_map.values() if isinstance(device_map, dict) else ()):
            raise CheckpointError("device_map: quantized layers are not offloaded to disk; use cpu or a device")

    def update_dtype(self, dtype: torch.dtype | str | None) -> torch.dtype | str:
        """4.57 would make all of it float32 by default; "auto" is the type of the files, as 5.x has it."""
        return "auto" if dtype is None else dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> nn.Module:
        dtype = dtype or torch.get_default_dtype()  # 4.57 says it so
        if self.pre_quantized:
            files = None if checkpoint_files is None else list(map(Path, checkpoint_files))
            self.work = Loading(model, self.quantization_config.record(), files, dtype)
        else:
            self.work = QuantizingWhileLoading(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        work, self.work = self.work, None
        work.finish(model)
        self.attach_to(model, self)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether a tensor from the files is for us to put in its place."""
        if isinstance(self.work, QuantizingWhileLoading):
            return self.work.wants(param_name)
        return not IS_V5 and isinstance(self.work, Loading) and self.work.keeps_type(param_name)

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        """4.57: put that tensor in its place. It comes in the type of the model, which is not that of each of ours."""
        if isinstance(self.work, QuantizingWhileLoading):
            self.work.take(param_name, param_value.to(target_device))
        else:
            self.work.take(model, param_name, target_device)

    def get_quantize_ops(self) -> QuantizeOp:
        """5.x: what does so."""
        return QuantizeOp(self.work)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """4.57: called before it fills with random numbers what is missing."""
        return missing_keys if self.work is None else self.work.check_missing(missing_keys)

    def get_state_dict_and_metadata(self, model: nn.Module, *_: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes; called first of all, so that the config can be brought up to date.

        Raises CheckpointError for state that safetensors cannot hold, such as offloaded weights.
        """
        if not quantized_layers(model) or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        tensors, tied = contents(model)
        _set_config(model, tied)
        # The files hold the model's own names, as the config does.
        model._weight_conversions = []  # 5.x
        model._checkpoint_conversion_mapping = {}  # 4.57, for models with vision
        return tensors, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True


def _set_config(model: nn.Module, tied: dict[str, str]) -> None:
    for part in _parts(model.config):  # a model inside of this one has said so of itself, by names of its own
        part.__dict__.pop("quantization_config", None)
    model.config.quantization_config = QGraftConfig(**describe(model, tied))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, QuantLayer):  # no float weight is tied; "tied" says which codes are shared
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configs inside of a config: those of a text and of a vision model, say."""
    for value in list(config.__dict__.values()):
        if isinstance(value, PretrainedConfig):
            yield value
            yield from _parts(value)
