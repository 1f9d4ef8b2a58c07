"""How the blocks of a model hand tensors to one another, found by watching the tensors.

A block is a module of an `nn.ModuleList`, or of an `nn.Sequential`. What a block got of the one before it is looked for
among its inputs, and everything else that it got (masks, rotary embeddings) is kept for when it runs again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Pass, Runner, current_batch, observed

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
    blocks = find_blocks(model, layers)
    if not run.batches or sum(any(inside(layer, block) for layer in layers) for block in blocks) < 2:
        return None
    watch = _Watch()
    try:
        with observed(model), without_cache(model), watch.on(model, blocks):
            run.each(lambda index: run.run(model, index))
        chain = watch.chain(len(run.batches))
    except NoChain:
        return None
    return chain if sum(map(chain.is_head, chain.blocks)) <= MOST_HEADS else None


def find_blocks(model: nn.Module, layers: set[str] | None = None) -> list[str]:
    """The modules of the outermost lists of modules; of a list in a list, its modules. A list is an `nn.ModuleList`, or
    an `nn.Sequential` where the model has none of these.

    layers: leave out lists that hold none of these.
    """
    return _in_lists(model, nn.ModuleList, layers) or _in_lists(model, nn.Sequential, layers)


def _in_lists(model: nn.Module, kind: type[nn.Module], layers: set[str] | None) -> list[str]:
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, kind) and not any(inside(name, outer) for outer in lists):
            lists.append(name)
    if layers is not None:
        lists = [outer for outer in lists if any(inside(layer, outer) for layer in layers)]
    blocks = []
    while lists:
        outer = lists.pop(0)
        names = [f"{outer}.{child}" if outer else child for child, _ in model.get_submodule(outer).named_children()]
        inner = [name for name in names if isinstance(model.get_submodule(name), kind)]
        lists += inner
        blocks += [name for name in names if name not in inner]
    return blocks


def inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


class _Watch:
    """Sees every call of the blocks; batches may take turns."""

    def __init__(self) -> None:
        self.called: dict[int, list[str]] = defaultdict(list)  # by each batch
        self.last: dict[int, list[Tensor]] = defaultdict(list)  # what the block before returned
        self.inputs: dict[str, dict[int, Inputs]] = defaultdict(dict)

    @contextmanager
    def on(self, model: nn.Module, blocks: list[str]) -> Iterator[None]:
        handles = []
        for name in blocks:
            module = model.get_submodule(name)
            handles += [module.register_forward_pre_hook(self._before(name), with_kwargs=True)]
            handles += [module.register_forward_hook(self._after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            batch = current_batch()
            if name in self.called[batch]:
                raise NoChain
            last = self.last[batch]
            inputs = map_leaves(
                (args, kwargs), lambda leaf: next((Slot(n) for n, t in enumerate(last) if leaf is t), leaf)
            )
            if not all(isinstance(leaf, (Slot, Tensor, *PLAIN)) for leaf in _leaves(inputs)):
                raise NoChain
            if _is_head(inputs):  # the block may change them in place
                inputs = map_leaves(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            self.called[batch].append(name)
            self.inputs[name][batch] = inputs

        return see

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.last[current_batch()] = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]

    def chain(self, batches: int) -> Chain:
        """NoChain if the batches, so many, do not agree on one."""
        blocks = self.called[0]
        if not blocks or any(self.called[batch] != blocks for batch in range(batches)):
            raise NoChain
        inputs = {name: [of_batch[batch] for batch in range(batches)] for name, of_batch in self.inputs.items()}
        if any(len({_is_head(i) for i in of_block}) != 1 for of_block in inputs.values()):
            raise NoChain
        return Chain(blocks, inputs)


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
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    # That of a decoder may be a copy of the model's.
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
