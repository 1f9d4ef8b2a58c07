"""LoRA on quantized layers, through peft: adapters in float, trained over codes that stay as they are.

    from peft import LoraConfig, PeftModel, get_peft_model
    config = on_quantized(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)       # train, then model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter", config=on_quantized(LoraConfig.from_pretrained("adapter")))

peft (0.17 or later) picks the class of an adapter by the class of the layer below it; `on_quantized` tells the config
which class that is for ours. peft does not save that with the adapter, hence the `config=` when one is loaded.
"""

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from ...layers import QuantLinear

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
