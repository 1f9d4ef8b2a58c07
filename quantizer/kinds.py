"""The kinds of modules that can be replaced: linear layers and embeddings, each a weight (N, K)."""

import sys

import torch
from torch import Tensor, nn

from ..layers import QuantEmbedding, QuantLayer, QuantLinear, Scheme, Stats
from ..layers.pointwise import features_last, is_pointwise

# What a subclass can have of its own without computing anything else.
WITHOUT_EFFECT = {
    "__init__", "reset_parameters", "extra_repr", "__constants__",
    "__module__", "__doc__", "__annotations__", "__qualname__", "__parameters__", "__orig_bases__", "__slots__",
    "__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__",
}  # fmt: skip
# Multiplies and then adds the bias, in two steps.
KNOWN_TO_COMPUTE_THE_SAME = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear`, a subclass of it, transformers' `Conv1D`, or a 1x1 `nn.Conv2d`; quantized ones too."""
    return isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module) or is_pointwise(module)


def is_embedding(module: nn.Module) -> bool:
    """`nn.Embedding`, a subclass of it, or a quantized one."""
    return isinstance(module, (nn.Embedding, QuantEmbedding))


def is_conv1d(module: nn.Module) -> bool:
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored as (K, N)."""
    return isinstance(module, _conv1d())


def is_plain(module: nn.Module) -> bool:
    """Whether it computes what these classes do: it is of one, of a subclass that only makes itself in its own way, or
    of one that is known to compute the same. Any other subclass may compute something else."""
    plain = (nn.Linear, nn.Embedding, nn.Conv2d, *_conv1d())
    for kind in type(module).__mro__:
        if kind in plain or f"{kind.__module__}.{kind.__qualname__}" in KNOWN_TO_COMPUTE_THE_SAME:
            return True
        if set(vars(kind)) - WITHOUT_EFFECT:
            return False
    return False


def base_of(module: nn.Module) -> str:
    """The class that it is a subclass of, in words."""
    names = {is_embedding: "nn.Embedding", is_conv1d: "Conv1D", is_pointwise: "nn.Conv2d"}
    return next((name for is_one, name in names.items() if is_one(module)), "nn.Linear")


def _conv1d() -> tuple[type, ...]:
    # Looked up, not imported: a model can only hold one if transformers has been imported.
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if found is None else (found,)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) of its weight as a linear layer has it: outputs by inputs, or rows by columns of an embedding."""
    if is_embedding(module):
        return module.num_embeddings, module.embedding_dim
    if is_pointwise(module):
        return module.out_channels, module.in_channels
    return (module.nf, module.nx) if is_conv1d(module) else (module.out_features, module.in_features)


def float_weight(module: nn.Module) -> Tensor:
    """The weight as (N, K), detached; a view of the module's own."""
    weight = module.weight.detach()
    if is_pointwise(module):
        return weight.flatten(1)
    return weight.t() if is_conv1d(module) else weight


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer in the place of the module would get: x with its features last."""
    return features_last(x, module.stride) if is_pointwise(module) else x


def quantized(module: nn.Module, cls: type[QuantLayer], scheme: Scheme, stats: Stats | None = None) -> QuantLayer:
    """The layer of class `cls` that takes the place of a float module."""
    if is_embedding(module):
        return cls.from_embedding(module, scheme)
    return cls.from_linear(as_linear(module), scheme, stats=stats)


def empty(
    cls: type[QuantLayer], shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, bias: bool = False
) -> QuantLayer:
    """A layer on meta, for a weight of this shape (N, K)."""
    n, k = shape
    if issubclass(cls, QuantEmbedding):
        return cls(n, k, scheme=scheme, device="meta", dtype=dtype)
    return cls(k, n, bias, scheme=scheme, device="meta", dtype=dtype)


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself if it is an `nn.Linear`, else one that computes the same and shares its bias."""
    if not (is_conv1d(module) or is_pointwise(module)):
        return module
    n, k = shape_of(module)
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(float_weight(module).contiguous(), requires_grad=False)
    linear.bias = module.bias
    linear.train(module.training)
    return linear
