"""Find and swap linear layers and embeddings. Knows modules and names, not numbers."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers import Experts, QuantLayer, is_fused, why_not_split
from ..layers.pointwise import is_pointwise
from .kinds import base_of, is_embedding, is_linear, is_plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What `nn.Module.__call__` looks up on the module. The dicts move over as they are: a handle's `remove()`
# refers to the very dict it was made for.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# torch's fused paths read `.weight` and never call the layer, and the encoder's one hands nested tensors to
# its layers; each is taken only while this attribute is true.
FUSED = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


@dataclass
class Site:
    """A place where a linear layer or an embedding (or what replaced one) is.

    names: every path to the module, more than one where it is shared; the root's path is "".
    obstacle: why it cannot be replaced, or "".
    tied: names of the other parameters that share the weight's memory.
    fused: the module whose 3-D parameters this layer, one of its experts, is a slice of until it is quantized.
    inside: the class of that module, also once it is split.
    """

    names: tuple[str, ...]
    module: nn.Module
    obstacle: str = ""
    tied: tuple[str, ...] = ()
    fused: nn.Module | None = None
    inside: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        """The name, for messages; the root has none."""
        return self.name or "(the model)"

    @property
    def is_embedding(self) -> bool:
        return is_embedding(self.module)


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear layer and embedding of the model, in the order of its modules, each module once.

    Fused experts count as the linear layers that `split_experts` would make of them.
    """
    found: dict[int, Site] = {}

    def add(name: str, module: nn.Module) -> Site:
        site = found.setdefault(id(module), Site((), module))
        site.names += (name,)
        return site

    split: dict[int, Experts] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module) or is_embedding(module):
            add(name, module)
        elif is_fused(module) and not why_not_split(module):
            if id(module) not in split:
                split[id(module)] = Experts(module, copy=False)
            for leaf, linear in split[id(module)].projections():
                add(f"{name}.{leaf}".lstrip("."), linear).fused = module
    for module in (*split.values(), *(m for m in model.modules() if isinstance(m, Experts))):
        for _, layer in module.projections():
            found[id(layer)].inside = module.kind.__name__
    owners = _weight_owners(model)
    adapters = _inside_adapters(model)
    for site in found.values():
        if not isinstance(site.module, QuantLayer):
            site.obstacle = adapters.get(id(site.module)) or _obstacle(site.module)
            site.tied = _tied(site, owners)
    return list(found.values())


def split_experts(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replace fused experts by one linear layer for each, where any of the layers `names` is among them.

    The model computes the same. The weights are copied, one module after another, and the fused ones let go.
    """
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if is_fused(module) and not why_not_split(module):
            paths[id(module)].append(path)
    wanted = {name.rpartition(".")[0].rpartition(".")[0] for name in names}  # path.3.down_proj -> path
    for places in paths.values():
        if not wanted.isdisjoint(places):
            model = replace(model, (tuple(places), Experts(model.get_submodule(places[0]))))
    return model


def replace(model: nn.Module, *swaps: tuple[tuple[str, ...], nn.Module]) -> nn.Module:
    """Put each `new` of the pairs (names, new) where the modules `names` are; returns the model (`new` itself if it
    was the root).

    All places or none: an interrupt in between puts the old modules back.
    """
    undo: list[tuple[dict, str, Any]] = []

    # Not setattr: ModuleDict keys and Sequential indices are no attribute names, and a class may override it.
    def put(where: dict[str, Any], key: str, value: Any) -> None:
        undo.append((where, key, where[key]))
        where[key] = value

    try:
        for names, new in swaps:
            _take_over(model.get_submodule(names[0]), new)
            if "" in names:
                return new
            for name in names:
                parent_name, _, leaf = name.rpartition(".")
                put(model.get_submodule(parent_name)._modules, leaf, new)
                for module in _ancestors(model, name):
                    for kind, switch in FUSED.items():
                        if isinstance(module, kind) and module.__dict__.get(switch):
                            put(module.__dict__, switch, False)
    except BaseException:
        for where, key, value in reversed(undo):
            where[key] = value
        raise
    return model


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def own_names(old: nn.Module, new: nn.Module) -> str:
    """Why `new` cannot have the attributes that the user hung on the old module, or ""."""
    taken = sorted(key for key in old.__dict__.keys() & _tensors_of(new) if old.__dict__[key] is not None)
    return f"has an attribute '{taken[0]}', and a {type(new).__name__} keeps a tensor by that name" if taken else ""


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks, training flag and whatever attributes the user hung on the old module. Raises ValueError for a name that
    is taken."""
    if reason := own_names(old, new):
        raise ValueError(reason)
    for hook in HOOKS:
        setattr(new, hook, getattr(old, hook))
    new.training = old.training
    if is_pointwise(old):
        new.stride = old.stride
    kept = {*new.__dict__, *_tensors_of(new)}
    for key, value in old.__dict__.items():
        if key not in kept and not hasattr(type(new), key):
            new.__dict__[key] = value


def _tensors_of(module: nn.Module) -> set[str]:
    return {*module._buffers, *module._parameters, *module._modules}


def _obstacle(module: nn.Module) -> str:
    kind = type(module)
    if kind.__name__ == "NonDynamicallyQuantizableLinear":
        return "out_proj of nn.MultiheadAttention, whose forward reads the weight and never calls this layer"
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed at each access; remove_parametrizations() first"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "a lazy layer without weights yet: run the model once first"
    if not is_plain(module):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"{name} is a subclass of {base_of(module)} that may compute something else"
    if is_embedding(module):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"{option} is for training its rows, and codes are not trained"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (accelerate hooks do so); remove that first"
    extra = [*(set(module._parameters) - {"weight", "bias"}), *module._buffers, *module._modules]
    if extra:
        return f"has more than weight and bias ({', '.join(sorted(extra))}), as weight_norm and pruning leave it"
    if type(module.weight) is not nn.Parameter or type(module.weight.data) is not Tensor:
        return f"its weight is a {type(module.weight).__name__}, not a plain tensor"
    if module.weight.dtype not in FLOATS:
        return f"its weight is {module.weight.dtype}, not float"
    return ""


def _inside_adapters(model: nn.Module) -> dict[int, str]:
    """Linear layers inside a PEFT adapter, which trains some and merges into others through `.weight`."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "merge"):
            for inner in module.modules():
                if is_linear(inner):
                    found[id(inner)] = "inside an adapter (LoRA or alike): merge it first, or add it after quantizing"
    return found


def _storage(tensor: Tensor) -> int | None:
    """What two tensors that share memory have in common; None for tensors without memory of their own."""
    if tensor.is_meta:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # tensor subclasses without one storage
        return None


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.UninitializedParameter):
            continue
        key = _storage(parameter)
        if key is not None:
            owners[key].append(name)
    return owners


def _tied(site: Site, owners: dict[int, list[str]]) -> tuple[str, ...]:
    module = site.module
    if parametrize.is_parametrized(module) or isinstance(module.weight, nn.UninitializedParameter):
        return ()
    own = {f"{name}.{leaf}".lstrip(".") for name in site.names for leaf in ("weight", "bias")}
    if site.fused is not None:
        homes = (".".join(name.split(".")[:-2]) for name in site.names)
        own = {f"{home}.{leaf}".lstrip(".") for home in homes for leaf in site.fused._parameters}
    key = _storage(site.fused.down_proj if site.fused is not None else module.weight)
    return tuple(n for n in owners.get(key, ()) if n not in own) if key is not None else ()
