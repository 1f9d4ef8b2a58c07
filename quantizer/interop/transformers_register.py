"""transformers gets to know us, without being imported for it: its `from_pretrained` and `save_pretrained` then do.

`import qgraft` calls `register`. A program that never imports transformers' quantizers (seconds of imports) pays
nothing; one that did, or does later, finds "qgraft" among the methods.
"""

import sys
from types import ModuleType
from typing import Any

from torch import nn
from wrapt import register_post_import_hook

from ..checkpoint import quantized_layers

AUTO = "transformers.quantizers.auto"


def register() -> None:
    """Add our config and quantizer to those of transformers, now or as soon as it is imported."""
    register_post_import_hook(_add, AUTO)


def _add(auto: ModuleType) -> None:
    from .transformers_config import METHOD, QGraftConfig
    from .transformers_quantizer import QGraftHfQuantizer

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:  # twice the same name is an error to transformers
        auto.register_quantization_config(METHOD)(QGraftConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(QGraftHfQuantizer)


def attach(model: nn.Module) -> None:
    """Let the `save_pretrained` of each transformers model in `model` write what is quantized in it.

    Nothing happens to models of others.
    """
    for module in reversed(_pretrained(model)):  # the outermost has the last word in a config that they share
        if quantized_layers(module):
            from .transformers_quantizer import QGraftHfQuantizer

            QGraftHfQuantizer.attach_to(module)


def _pretrained(model: nn.Module) -> list[Any]:
    # Looked up, not imported: a model can only be one if transformers has been imported.
    cls = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]
