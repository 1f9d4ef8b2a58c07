"""What counts as a linear layer, and the `nn.Linear` that it amounts to."""

import sys

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear`, a subclass of it, or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored as (K, N)."""
    return isinstance(module, _conv1d())


def is_plain(module: nn.Module) -> bool:
    """Whether it is of these classes exactly; a subclass may compute something else."""
    return type(module) in (nn.Linear, *_conv1d())


def _conv1d() -> tuple[type, ...]:
    # Looked up, not imported: a model can only hold one if transformers has been imported.
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if found is None else (found,)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, quantized or not."""
    return (module.nf, module.nx) if is_conv1d(module) else (module.out_features, module.in_features)


def float_weight(module: nn.Module) -> Tensor:
    """The weight as (N, K), detached; a view of the module's own."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself if it is an `nn.Linear`, else one that computes the same and shares its bias."""
    if not is_conv1d(module):
        return module
    n, k = shape_of(module)
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(float_weight(module).contiguous(), requires_grad=False)
    linear.bias = module.bias
    linear.train(module.training)
    return linear
