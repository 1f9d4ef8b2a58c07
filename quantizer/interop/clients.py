"""The libraries that have a `save_pretrained` and a `from_pretrained` of their own; none is imported for it."""

from torch import nn

from . import diffusers_register, transformers_register


def register() -> None:
    """Make our folders known to them, now or as soon as they are imported."""
    transformers_register.register()
    diffusers_register.register()


def attach(model: nn.Module) -> None:
    """Let the `save_pretrained` of each of their models in `model` write what is quantized in it."""
    transformers_register.attach(model)
    diffusers_register.attach(model)
