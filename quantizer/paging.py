"""A model whose blocks are in memory one at a time: read from files when they are called, let go for the next one.

    with the whole model in memory    batch 0: block 0, block 1, ...   batch 1: block 0, block 1, ...
    here                              block 0: batch 0, batch 1, ...   block 1: batch 0, batch 1, ...

A forward pass knows no blocks, so each batch has one of its own, and is stopped where it calls a block that is not in
memory. Once all have been stopped the next block is read, and they go on. Which batch runs when makes no difference to
what it computes, so all numbers are those of the model in memory.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..layers import QuantLayer
from .calibration import Runner
from .chain import find_blocks, inside, without_cache
from .checkpoint import join
from .errors import PlanError, some
from .float_files import CannotStream, FloatFiles
from .plan import Plan
from .surgery import split_experts
from .units import float_modules, make_units

T = TypeVar("T")


class PagedModel:
    """`model` is on meta but for what lies outside of its blocks, and the block that is in memory.

    skeleton: the float model on meta, which is not changed. files: its weights. stored: gives the state of a layer that
    is quantized by now, when its block is read again. device: where the weights go.
    Raises CannotStream if the model has no list of blocks, and PlanError for NaN in a weight that is to be quantized,
    which for blocks comes when they are first read.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        plan: Plan,
        files: FloatFiles,
        stored: Callable[[str], dict[str, Tensor]],
        device: torch.device | None = None,
    ):
        self.skeleton, self.files, self.stored = skeleton, files, stored
        self.device = device or torch.device("cpu")
        self.unchecked = {planned.name: planned.label for planned in plan.todo}
        self.fused = {unit.home: unit for unit in make_units(skeleton, plan) if unit.fused}
        self.model = split_experts(copy.deepcopy(skeleton), self.unchecked).eval()
        self.blocks = find_blocks(self.model)
        if not self.blocks:
            raise CannotStream(
                "the model has no list of blocks (nn.ModuleList or nn.Sequential) to have in memory one at a time"
            )
        self.names = self._sort()
        self.resident = ""
        self._read("")
        self.kept = {id(t): t for t in (*self.model.parameters(), *self.model.buffers()) if not t.is_meta}
        self.runs: set[greenlet] = set()
        for block in self.blocks:
            for module in self.model.get_submodule(block).modules():
                module.register_forward_pre_hook(partial(self._called, block))

    def bring(self, layer: str) -> None:
        """Have the block in memory that holds this layer, if one does."""
        if block := self._block_of(layer):
            self._bring(block)

    def abreast(self, steps: Iterable[Callable[[], T]]) -> list[T]:
        """What the steps return, each of which runs the model once. They take turns, and each block is read once."""
        runs = [greenlet(step) for step in steps]
        for run in runs:
            run.gr_context = copy_context()
        results: list[Any] = [None] * len(runs)
        wanted: dict[int, str] = {}  # by those that have been stopped

        def go_on(index: int) -> None:
            value = runs[index].switch()
            if runs[index].dead:
                results[index] = value
                wanted.pop(index, None)
            else:
                wanted[index] = value

        self.runs.update(runs)
        try:
            for index in range(len(runs)):
                go_on(index)
            while wanted:
                self._bring(wanted[min(wanted)])
                for index in [i for i in sorted(wanted) if wanted[i] == self.resident]:
                    go_on(index)
        finally:
            for run in runs:
                if not run.dead:
                    run.throw(GreenletExit)
            self.runs.difference_update(runs)
        return results

    def _called(self, block: str, module: nn.Module, args: tuple) -> None:
        """Whatever of a block is called finds it in memory."""
        while self.resident != block:
            if getcurrent() in self.runs:
                getcurrent().parent.switch(block)
            else:
                self._bring(block)

    def _bring(self, block: str) -> None:
        if self.resident == block:
            return
        if self.resident:
            self._let_go(self.resident)
        self.resident = ""  # should reading fail
        self._read(block)
        self.resident = block

    def _let_go(self, block: str) -> None:
        for module in self.model.get_submodule(block).modules():
            for leaf, p in module._parameters.items():
                if p is not None and id(p) not in self.kept:
                    module._parameters[leaf] = nn.Parameter(p.detach().to("meta"), requires_grad=False)
            for leaf, b in module._buffers.items():
                if b is not None and id(b) not in self.kept:
                    module._buffers[leaf] = b.to("meta")

    def _read(self, block: str) -> None:
        """Give the tensors of a block their values, or all that lie in none."""
        names = [n for n in self.names[block] if not isinstance(self._home(n)[0], QuantLayer)]
        tensors, made = self.files.read(names), {}
        for name in names:
            module, leaf = self._home(name)
            tensor, key = tensors.pop(name), id(self.files.state[name])
            if key not in made:
                made[key] = self._own(tensor, isinstance(self.files.state[name], nn.Parameter))
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = made[key]
        for unit in self.fused.values():
            if self._block_of(unit.home) == block:
                fused = self.files.read(join(unit.home, leaf) for leaf in unit.leaves)
                for name, linear in float_modules(self.skeleton, unit, fused):
                    module = self.model.get_submodule(name)
                    if not isinstance(module, QuantLayer):
                        parameters = {
                            leaf: p.to(self.device) for leaf, p in linear._parameters.items() if p is not None
                        }
                        module._parameters.update(parameters)
        if block:
            for name, module in self.model.get_submodule(block).named_modules(prefix=block):
                if isinstance(module, QuantLayer):
                    state = {key: self._own(tensor) for key, tensor in self.stored(name).items()}
                    module.load_state_dict(state, assign=True)
        self._check(block)

    def _own(self, tensor: Tensor, is_parameter: bool = False) -> Tensor:
        """A copy, so that the file need not stay open."""
        tensor = tensor.clone() if self.device.type == "cpu" else tensor.to(self.device)
        return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def _check(self, block: str) -> None:
        problems = []
        for name in [name for name in self.unchecked if self._block_of(name) == block]:
            label, module = self.unchecked.pop(name), self.model.get_submodule(name)
            if not isinstance(module, QuantLayer) and not torch.isfinite(module.weight).all():
                problems.append(f"layer '{label}' has NaN or infinite weights")
        if problems:
            raise PlanError(some(problems, "\n", show=10))

    def _home(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _block_of(self, name: str) -> str:
        return next((block for block in self.blocks if inside(name, block)), "")

    def _sort(self) -> dict[str, list[str]]:
        """The names of the tensors to read for each block; "": for what lies in none, or in several."""
        split = {join(unit.home, leaf) for unit in self.fused.values() for leaf in unit.leaves}
        state = {name: tensor for name, tensor in self.files.state.items() if name not in split}
        left = [n for n, b in self.skeleton.named_buffers() if b.is_meta and n not in self.files.origins]
        if left:
            raise CannotStream(f"the model cannot run: no file holds the buffers {some(left)}, and they are on meta")
        blocks: dict[int, set[str]] = defaultdict(set)
        for name, tensor in state.items():
            blocks[id(tensor)].add(self._block_of(name))
        names: dict[str, list[str]] = {block: [] for block in ("", *self.blocks)}
        for name, tensor in state.items():
            if name in self.files.origins:
                names[self._block_of(name) if len(blocks[id(tensor)]) == 1 else ""].append(name)
        return names


class PagedRunner(Runner):
    """Runs the batches of another one through a paged model."""

    def __init__(self, run: Runner, paged: PagedModel):
        super().__init__(run.batches, progress=run.progress, device=paged.device)
        self.paged = paged

    def each(self, step: Callable[[int], T]) -> list[T]:
        with without_cache(self.paged.model):  # each batch would keep its own, of all blocks so far
            return self.paged.abreast(partial(step, index) for index in range(len(self.batches)))
