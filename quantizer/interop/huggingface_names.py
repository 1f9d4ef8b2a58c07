"""How tensors are called in the files of a transformers model, and in the model itself.

transformers 5 renames and converts while it loads: experts that lie one by one become one 3-D parameter, fused
projections are split. It is asked for the very rules that `from_pretrained` follows. Of transformers 4 only files that
use the model's own names, with or without the prefix of the base model, are known to be read right.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..float_files import CannotStream, Origin


def names_of_files(model: nn.Module, keys: Iterable[str]) -> dict[str, Origin]:
    """The origin of each tensor of a transformers model (on meta) in files that have tensors of the names `keys`.

    Raises CannotStream where only loading the whole model is sure to read the files right.
    """
    _refuse_what_loading_would_change(model)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return _with_or_without_prefix(model, keys)
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, Origin] = {}
    groups: dict[str, list[tuple[str, str]]] = {}  # first tensor that is made -> (name in the files, pattern)
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            continue  # from_pretrained does not use it either
        if pattern is not None:
            groups.setdefault(name, []).append((key, pattern))
        elif name in found:
            raise CannotStream(f"{key!r} and {found[name].keys[0]!r} in the files are both {name!r} of the model")
        else:
            found[name] = Origin((key,))
    for name, sources in groups.items():
        rule = by_pattern[sources[0][1]]
        origin = Origin(tuple(key for key, _ in sources), _converter(model, rule, name, sources, state[name].dtype))
        found.update({name.replace(rule.target_patterns[0], target): origin for target in rule.target_patterns})
    return found


def _converter(
    model: nn.Module, rule: Any, name: str, sources: list[tuple[str, str]], dtype: torch.dtype
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def make(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = copy.deepcopy(rule)
        for key, pattern in sources:
            fresh.add_tensor(name, key, pattern, tensors[key].to(dtype))
        made = fresh.convert(name, model=model, config=model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}

    return make


def _with_or_without_prefix(model: nn.Module, keys: Iterable[str]) -> dict[str, Origin]:
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    found = {}
    for key in keys:
        for name in (key, key.removeprefix(prefix), prefix + key):
            if name in state:
                found[name] = Origin((key,))
                break
    return found


def _refuse_what_loading_would_change(model: nn.Module) -> None:
    kind, dtype = type(model), model.dtype
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype in (torch.float16, torch.bfloat16) else None
    loose = getattr(model, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    if strict or loose:
        raise CannotStream(f"{kind.__name__} keeps some of its weights in float32")
    if getattr(model.config, "transformers_weights", None) or getattr(type(model.config), "extra_files", None):
        raise CannotStream(f"{kind.__name__} names files of its own to load")
