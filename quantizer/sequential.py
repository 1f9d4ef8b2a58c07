"""Sequential calibration: each layer's statistics from the part of the model before it that is quantized already.

A model whose blocks (the modules of an `nn.ModuleList`) hand their outputs to one another is run block by block, on two
streams of activations: the exact one, of the float model, and the one that the quantized blocks make. Inside a block
the layers come in the order of their calls, those that read the same tensor together. Only the activations of one
block are in memory at a time. How blocks hand things on is found by watching the tensors, not by names: what a block
got of the one before is looked for among its inputs, and everything else that it got (masks, rotary embeddings) is
kept for when it runs again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Stats
from .calibration import Pass, Runner, Stop, observed, without_padding
from .errors import CalibrationError
from .kinds import inputs_of

# Blocks that take what no block before them gave, and whose inputs the whole model up to them has to make.
MOST_HEADS = 4
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)

Inputs = tuple[tuple, dict[str, Any]]
# What a layer got, for each batch and each call, with how often it had been changed in place.
Seen = dict[str, list[list[tuple[Tensor, int]]]]


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
    if not run.batches or sum(any(_inside(layer, block) for layer in layers) for block in blocks) < 2:
        return None
    chain = Chain([])
    try:
        with observed(model), _no_cache(model):
            for index in range(len(run.batches)):
                _capture(chain, model, blocks, run, index)
    except NoChain:
        return None
    return chain if sum(map(chain.is_head, chain.blocks)) <= MOST_HEADS else None


class Sequence:
    """Walks down a chain; what comes out of `stages` is to be quantized before it goes on.

    model: a function that gives the model as it is now. needs: what statistics each layer wants.
    """

    def __init__(self, chain: Chain, model: Callable[[], nn.Module], needs: Mapping[str, frozenset[str]], run: Runner):
        self.chain, self.model, self.needs, self.run = chain, model, needs, run

    @property
    def layers(self) -> set[str]:
        """Those that this calibrates: inside of its blocks."""
        return {name for name in self.needs if any(_inside(name, block) for block in self.chain.blocks)}

    def stages(self, changed: bool = False) -> Iterator[tuple[list[str], dict[str, Stats]]]:
        """(names, statistics of those that the data reached), for all `layers`.

        changed: whether something before the first block is quantized, so that the two streams differ from there on.
        """
        exact: list[Any] = []  # what the block before returned, for each batch
        noisy: list[Any] = []
        for block in self.chain.blocks:
            if self.chain.is_head(block):
                kept = self.chain.inputs[block]
                exact_in, noisy_in = kept, [self._as_it_is(block, i) for i in range(len(kept))] if changed else kept
            else:
                exact_in = [_filled(inputs, out) for inputs, out in zip(self.chain.inputs[block], exact, strict=True)]
                noisy_in = [_filled(inputs, out) for inputs, out in zip(self.chain.inputs[block], noisy, strict=True)]
            names = [name for name in self.needs if _inside(name, block)]
            seen, groups, exact = self._watch(block, names, exact_in)
            for group in groups:
                yield group, self._statistics(block, group, seen, noisy_in)
            if missed := [name for name in names if not seen[name]]:
                yield missed, {}
            changed = changed or bool(names)
            noisy = self._outputs(block, noisy_in) if changed else exact
            self.chain.inputs.pop(block)

    def _watch(self, block: str, names: list[str], inputs: list[Inputs]) -> tuple[Seen, list[list[str]], list[Any]]:
        """Run a float block: what each layer got, for each batch and call; the groups that got it together; outputs."""
        seen: Seen = {name: [] for name in names}
        groups: list[list[str]] = []
        last: Tensor | None = None

        def see(name: str, x: Tensor, batch: int) -> None:
            nonlocal last
            seen[name] += [[] for _ in range(batch + 1 - len(seen[name]))]
            kept = without_padding(x)
            seen[name][batch].append((kept, kept._version))
            if not any(name in group for group in groups):
                if groups and x is last:
                    groups[-1].append(name)
                else:
                    groups.append([name])
            last = x

        with self._hooks(names, see) as at:
            outputs = [at(i, lambda i=i: self._call(block, inputs[i])) for i in range(len(inputs))]
        return seen, groups, outputs

    def _statistics(self, block: str, group: list[str], seen: Seen, inputs: list[Inputs]) -> dict[str, Stats]:
        stats = {name: Stats(self.needs[name]) for name in group}
        paired = {name for name in group if "second_moment" in self.needs[name]}
        calls: dict[tuple[str, int], int] = {}
        # A layer that is called once has been seen when its group's last one has.
        once = all(len(batch) == 1 for name in group for batch in seen[name])

        def see(name: str, x: Tensor, batch: int) -> None:
            call = calls[name, batch] = calls.get((name, batch), -1) + 1
            x = without_padding(x)
            try:
                stats[name].update(x)
            except ValueError as error:
                raise CalibrationError(f"layer '{name}', calibration batch {batch}: {error}") from None
            known = seen[name][batch] if batch < len(seen[name]) else []
            exact, version = known[call] if call < len(known) else (None, 0)
            if exact is None or exact.shape != x.shape or exact._version != version:
                paired.discard(name)  # other tokens than the float model's, as when a router sends them elsewhere
            elif name in paired:
                stats[name].update_cross(exact, x)
            if once and name == group[-1]:
                raise Stop

        with self._hooks(group, see) as at:
            for i in range(len(inputs)):
                at(i, lambda i=i: self._call(block, inputs[i]))
        for name in set(group) - paired:
            stats[name].drop_cross()
        return {name: s for name, s in stats.items() if s.tokens}

    def _outputs(self, block: str, inputs: list[Inputs]) -> list[Any]:
        with observed(self.model()):
            return [self._call(block, i) for i in inputs]

    def _as_it_is(self, block: str, index: int) -> Inputs:
        """What a block gets of the model as it is now, for one batch."""
        got: list[Inputs] = []

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            got.append((args, kwargs))
            raise Stop

        model = self.model()
        handle = model.get_submodule(block).register_forward_pre_hook(see, with_kwargs=True)
        try:
            with observed(model), _no_cache(model):
                self.run.run(model, index)
        except Stop:
            pass
        finally:
            handle.remove()
        return got[0]

    @contextmanager
    def _hooks(self, names: list[str], see: Callable[[str, Tensor, int], None]) -> Iterator[Callable]:
        """Call `see(layer, input, batch)` whenever one of the layers is called inside of what this gives runs."""
        batch = 0

        def hook(name: str) -> Callable:
            def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                see(name, inputs_of(module, args[0] if args else next(iter(kwargs.values()))), batch)

            return look

        def at(index: int, call: Callable[[], Any]) -> Any:
            nonlocal batch
            batch = index
            try:
                with self.run.padding(index):
                    return call()
            except Stop:
                return None

        model = self.model()
        hooks = [(model.get_submodule(name), hook(name)) for name in names]
        handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module, look in hooks]
        try:
            with observed(model):
                yield at
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, block: str, inputs: Inputs) -> Any:
        # A block may change its inputs in place, and these will be needed again.
        args, kwargs = _map(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        return self.model().get_submodule(block)(*args, **kwargs)


def _blocks(model: nn.Module, layers: set[str]) -> list[str]:
    """The modules of the outermost lists of modules that hold one of the layers."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_inside(name, outer) for outer in lists):
            lists.append(name)
    return [
        f"{outer}.{child}" if outer else child
        for outer in lists
        if any(_inside(layer, outer) for layer in layers)
        for child, _ in model.get_submodule(outer).named_children()
    ]


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _capture(chain: Chain, model: nn.Module, blocks: list[str], run: Runner, index: int) -> None:
    """Add the inputs of every block for one batch; NoChain if they do not fit the chain so far."""
    called: list[str] = []
    last: list[Any] = []

    def before(name: str) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if name in called:
                raise NoChain
            inputs = _map((args, kwargs), _slot)
            if not all(isinstance(leaf, (Slot, Tensor, *PLAIN)) for leaf in _leaves(inputs)):
                raise NoChain
            if _is_head(inputs):  # the block may change them in place
                inputs = _map(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
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


def _filled(inputs: Inputs, output: Any) -> Inputs:
    tensors = [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]
    return _map(inputs, lambda leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Every leaf of nested tuples, lists and dicts changed."""
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    if type(value) is dict:
        return {key: _map(item, change) for key, item in value.items()}
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
def _no_cache(model: nn.Module) -> Iterator[None]:
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
