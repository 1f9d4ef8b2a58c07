"""diffusers gets to know us, without being imported for it: its `from_pretrained` and `save_pretrained` then do.

The sibling of transformers_register.py. Without it a model quantized by us would be saved with no word about that, and
diffusers would load it with random weights.
"""

import sys
from types import ModuleType

from torch import nn
from wrapt import register_post_import_hook

from ..checkpoint import quantized_layers

AUTO = "diffusers.quantizers.auto"


def register() -> None:
    """Add our config and quantizer to those of diffusers, now or as soon as it is imported."""
    register_post_import_hook(_add, AUTO)


def _add(auto: ModuleType) -> None:
    from .diffusers import METHOD, QGraftConfig, QGraftQuantizer

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD.value] = QGraftConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD.value] = QGraftQuantizer


def attach(model: nn.Module) -> None:
    """Let the `save_pretrained` of each diffusers model in `model` write what is quantized in it."""
    # Looked up, not imported: a model can only be one if diffusers has been imported.
    cls = getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)
    for module in () if cls is None else reversed([m for m in model.modules() if isinstance(m, cls)]):
        if quantized_layers(module):
            from .diffusers import QGraftQuantizer

            QGraftQuantizer.attach_to(module)
