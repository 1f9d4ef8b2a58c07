"""How the blocks of a model hand tensors to one another, found by watching the tensors.

A block is a module of an `nn.ModuleList`. What a block got of the one before it is looked for among its inputs, and
everything else that it got (masks, rotary embeddings) is kept for when it runs again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Pass, Runner, observed

# Blocks that take what no block before them gave, and whose inputs the whole model up to them has to make.
MOST_HEADS = 4
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)

Inputs = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Slot:
    """In the inputs of a block: the n-th tensor of what the block before it returned."""

    index: int


class NoChain(Pass):
    """The blocks of this model do not simply hand on to one another."""


@dataclass
class Chain:
    """Blocks in the order of their calls.

    inputs: of each block, for each batch, with a Slot for every tensor that the block before it returned; those of the
    first block, and of one that takes nothing from the block before it, are whole.
    """

    blocks: list[str]
    inputs: dict[str, list[Inputs]] = field(default_factory=dict)

    def is_head(self, block: str) -> bool:
        return _is_head(self.inputs[block][0])


def find_chain(model: nn.Module, layers: set[str], run: Runner) -> Chain | None:
    """How the blocks that hold these layers hand on to one another, from one pass over the data.

    None if the data is a function, if fewer than two blocks hold a layer, or if a block is called more than once, takes
    objects that keep state, or if more than MOST_HEADS blocks take nothing from the one before.
    """
    blocks = _blocks(model, layers)
    if not run.batches or sum(any(inside(layer, block) for layer in layers) for block in blocks) < 2:
        return None
    chain = Chain([])
    try:
        with observed(model), without_cache(model):
            for index in range(len(run.batches)):
                _capture(chain, model, blocks, run, index)
    except NoChain:
        return None
    return chain if sum(map(chain.is_head, chain.blocks)) <= MOST_HEADS else None


def _blocks(model: nn.Module, layers: set[str]) -> list[str]:
    """The modules of the outermost lists of modules that hold one of the layers."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(inside(name, outer) for outer in lists):
            lists.append(name)
    return [
        f"{outer}.{child}" if outer else child
        for outer in lists
        if any(inside(layer, outer) for layer in layers)
        for child, _ in model.get_submodule(outer).named_children()
    ]


def inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _capture(chain: Chain, model: nn.Module, blocks: list[str], run: Runner, index: int) -> None:
    """Add the inputs of every block for one batch; NoChain if they do not fit the chain so far."""
    called: list[str] = []
    last: list[Any] = []

    def before(name: str) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if name in called:
                raise NoChain
            inputs = map_leaves((args, kwargs), _slot)
            if not all(isinstance(leaf, (Slot, Tensor, *PLAIN)) for leaf in _leaves(inputs)):
                raise NoChain
            if _is_head(inputs):  # the block may change them in place
                inputs = map_leaves(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            called.append(name)
            chain.inputs.setdefault(name, []).append(inputs)

        return see

    def _slot(leaf: Any) -> Any:
        return next((Slot(n) for n, given in enumerate(last) if leaf is given), leaf)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        last[:] = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]

    handles = []
    for name in blocks:
        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True)]
        handles += [module.register_forward_hook(after)]
    try:
        run.run(model, index)
    finally:
        for handle in handles:
            handle.remove()
    if index == 0:
        chain.blocks = called
    elif called != chain.blocks:
        raise NoChain
    if not called or any(chain.is_head(name) != _is_head(chain.inputs[name][-1]) for name in called):
        raise NoChain


def _is_head(inputs: Inputs) -> bool:
    return not any(isinstance(leaf, Slot) for leaf in _leaves(inputs))


def filled(inputs: Inputs, output: Any) -> Inputs:
    tensors = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]
    return map_leaves(inputs, lambda leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Every leaf of nested tuples, lists and dicts changed."""
    if type(value) in (tuple, list):
        return type(value)(map_leaves(item, change) for item in value)
    if type(value) is dict:
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        yield from _leaves(tuple(value.values()))
    else:
        yield value


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models without their cache of keys and values: it keeps state from one run of a block to the next."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
