"""Sequential calibration: each layer's statistics from the part of the model before it that is quantized already.

A model whose blocks hand their outputs to one another is run block by block, on two streams of activations: the exact
one, of the float model, and the one that the quantized blocks make. Inside a block the layers come in the order of
their calls, those that read the same tensor together and with one set of statistics. Only the activations of one block
are in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from ..layers import Stats
from .calibration import Runner, Stop, current_batch, observed, without_padding
from .chain import Chain, Inputs, filled, inside, map_leaves, without_cache
from .errors import CalibrationError
from .kinds import inputs_of

# What a layer got, for each batch and each call, with how often it had been changed in place.
Seen = dict[str, list[list[tuple[Tensor, int]]]]


class _Parted(Exception):
    """Layers that got one tensor in the float model do not in the quantized one."""


class Sequence:
    """Walks down a chain; what comes out of `stages` is to be quantized before it goes on.

    model: a function that gives the model as it is now. needs: what statistics each layer wants. done: whether layers
    are known to need none.
    """

    def __init__(
        self,
        chain: Chain,
        model: Callable[[], nn.Module],
        needs: Mapping[str, frozenset[str]],
        run: Runner,
        done: Callable[[list[str]], bool] = lambda names: False,
    ):
        self.chain, self.model, self.needs, self.run, self.done = chain, model, needs, run, done

    @property
    def layers(self) -> set[str]:
        """Those that this calibrates: inside of its blocks."""
        return {name for name in self.needs if any(inside(name, block) for block in self.chain.blocks)}

    def stages(self, changed: bool = False) -> Iterator[tuple[list[str], dict[str, Stats]]]:
        """(names, statistics of those that the data reached), for all `layers`.

        changed: whether something before the first block is quantized, so that the two streams differ from there on.
        """
        exact: list[Any] = []  # what the block before returned, for each batch
        noisy: list[Any] = []
        for block in self.chain.blocks:
            if self.chain.is_head(block):
                kept = self.chain.inputs[block]
                exact_in, noisy_in = kept, self._as_they_are(block) if changed else kept
            else:
                exact_in = [filled(inputs, out) for inputs, out in zip(self.chain.inputs[block], exact, strict=True)]
                noisy_in = [filled(inputs, out) for inputs, out in zip(self.chain.inputs[block], noisy, strict=True)]
            names = [name for name in self.needs if inside(name, block)]
            seen, groups, exact = self._watch(block, names, exact_in)
            for group in groups:
                yield group, {} if self.done(group) else self._statistics(block, group, seen, noisy_in)
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
        # A layer that is called once has been seen when its group's last one has.
        once = all(len(batch) == 1 for name in group for batch in seen[name])
        if once and len({self.needs[name] for name in group}) == 1:
            try:
                of_all = self._collected(block, group, seen, inputs, once, shared=True)
                return dict.fromkeys(group, of_all[group[0]]) if of_all else {}
            except _Parted:
                pass
        return self._collected(block, group, seen, inputs, once, shared=False)

    def _collected(
        self, block: str, group: list[str], seen: Seen, inputs: list[Inputs], once: bool, shared: bool
    ) -> dict[str, Stats]:
        """shared: collect for the first of the group only. Raises _Parted where another one gets another tensor."""
        collected = group[:1] if shared else group
        stats = {name: Stats(self.needs[name]) for name in collected}
        paired = {name for name in collected if "second_moment" in self.needs[name]}
        calls: dict[tuple[str, int], int] = {}
        first: tuple[Tensor, int] | None = None

        def see(name: str, x: Tensor, batch: int) -> None:
            nonlocal first
            if name in stats:
                first = x, x._version
                collect(name, without_padding(x), batch)
            elif first is None or x is not first[0] or x._version != first[1]:
                raise _Parted
            if once and name == group[-1]:
                raise Stop

        def collect(name: str, x: Tensor, batch: int) -> None:
            call = calls[name, batch] = calls.get((name, batch), -1) + 1
            try:
                stats[name].update(x, batch % 2)
            except ValueError as error:
                raise CalibrationError(f"layer '{name}', calibration batch {batch}: {error}") from None
            known = seen[name][batch] if batch < len(seen[name]) else []
            exact, version = known[call] if call < len(known) else (None, 0)
            if exact is None or exact.shape != x.shape or exact._version != version:
                paired.discard(name)  # other tokens than the float model's, as when a router sends them elsewhere
            elif name in paired:
                stats[name].update_drift(exact, x, batch % 2)

        with self._hooks(group, see) as at:
            for i in range(len(inputs)):
                first = None
                at(i, lambda i=i: self._call(block, inputs[i]))
        for name in set(collected) - paired:
            stats[name].drop_drift()
        return {name: s for name, s in stats.items() if s.tokens}

    def _outputs(self, block: str, inputs: list[Inputs]) -> list[Any]:
        with observed(self.model()):
            return [self._call(block, i) for i in inputs]

    def _as_they_are(self, block: str) -> list[Inputs]:
        """What a block gets of the model as it is now, for each batch."""
        got: dict[int, Inputs] = {}

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            got[current_batch()] = (args, kwargs)
            raise Stop

        def run(index: int) -> None:
            with suppress(Stop):
                self.run.run(model, index)

        model = self.model()
        handle = model.get_submodule(block).register_forward_pre_hook(see, with_kwargs=True)
        try:
            with observed(model), without_cache(model):
                self.run.each(run)
        finally:
            handle.remove()
        return [got[index] for index in range(len(got))]

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
                with self.run.at(index):
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
        args, kwargs = map_leaves(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        return self.model().get_submodule(block)(*args, **kwargs)
