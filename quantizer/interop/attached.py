"""What the quantizers that we give to transformers and to diffusers have in common."""

from typing import Any

from torch import nn


class AttachedQuantizer:
    """Beside transformers' `HfQuantizer` or diffusers' `DiffusersQuantizer` among the bases of a class."""

    @staticmethod
    def write_config(model: nn.Module) -> Any:
        """Let `model.config` say what is quantized in it, and return that."""
        raise NotImplementedError

    @classmethod
    def attach_to(cls, model: nn.Module, quantizer: "AttachedQuantizer | None" = None) -> None:
        """Let `model.save_pretrained` write what is quantized; `model.config` says so from now on."""
        config = cls.write_config(model)
        model.hf_quantizer = quantizer or cls(config, pre_quantized=True)
        model.hf_quantizer.quantization_config = config

    @property
    def is_trainable(self) -> bool:
        """Adapters are: gradients go through every quantized layer to its input."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
