"""The libraries that have a `save_pretrained` and a `from_pretrained` of their own; none is imported for it."""

from torch import nn

from ..checkpoint import quantized_layers
from . import diffusers_register, transformers_register


def register() -> None:
    """Make our folders known to them, now or as soon as they are imported."""
    transformers_register.register()
    diffusers_register.register()


def attach(model: nn.Module) -> None:
    """Let the `save_pretrained` of each of their models in `model` write what is quantized in it."""
    transformers_register.attach(model)
    diffusers_register.attach(model)


def detach(model: nn.Module) -> None:
    """Take that back from each of their models that has no quantized layer any more."""
    for module in model.modules():
        known = type(module.__dict__.get("hf_quantizer")).__module__.startswith(__package__)
        if known and not quantized_layers(module):
            del module.hf_quantizer
            if hasattr(module, "_internal_dict"):  # of diffusers, frozen
                rest = {key: value for key, value in module.config.items() if key != "quantization_config"}
                module._internal_dict = type(module.config)(rest)
            else:
                module.config.__dict__.pop("quantization_config", None)  # parts of one model share a config
