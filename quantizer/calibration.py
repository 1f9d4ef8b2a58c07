"""Run data through the model and collect what the schemes ask for.

Layers that read the same tensor (q, k and v; gate and up) share one set of statistics, found by watching
which tensors they get, not by their names.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers import Stats
from ..recipes import CalibrationSpec
from .batches import Batch, as_batches, describe, map_tensors, run_on, take, tensors_of
from .errors import CalibrationError
from .kinds import inputs_of

# The attention_mask of the batch that runs, (B, T), if it has one: what the model ignores must not count.
_mask: ContextVar[Tensor | None] = ContextVar("mask", default=None)
_batch: ContextVar[int] = ContextVar("batch")

T = TypeVar("T")


class Pass(Exception):
    """Raised by a hook to end a run of the model; no failure of the model."""


class Stop(Pass):
    """Everything wanted from this run of the model has been seen."""


class _NotShared(Pass):
    """A layer that shares statistics got something else than the layer it shares them with."""


def make_runner(data: Any, spec: CalibrationSpec, tokenizer: Any = None, progress: bool = True) -> "Runner":
    """What runs the calibration data through a model.

    data: a tensor or mapping (one batch); an iterable of tensors, mappings, tuples or texts, such as a
    DataLoader or a list; or a function that takes the model and runs it, several times if the statistics take
    several passes. Texts need a `tokenizer`. At most `spec.samples` sequences (of the first dimension) are
    used, texts cut at `spec.tokens`; a batch whose tensors disagree in that dimension is used whole. The rows of float
    matrices (B, K) are tokens, and at most `spec.samples` times `spec.tokens` of them are used. Tokens that
    a mapping's `attention_mask` (B, T) leaves out do not count.
    """
    if callable(data) and not isinstance(data, (Tensor, Mapping)) and not hasattr(data, "__iter__"):
        return Runner(function=data)
    batches = take(as_batches(data, spec, tokenizer), spec)
    if not batches:
        raise CalibrationError("the calibration data is empty")
    return Runner(batches, progress=progress)


class Runner:
    """Runs calibration data through a model: all of it by a call, or batch after batch if it comes in batches.

    device: where the model takes its inputs; None: where its first parameter is.
    """

    def __init__(
        self,
        batches: Sequence[Batch] = (),
        function: Callable[[nn.Module], Any] | None = None,
        progress: bool = True,
        device: torch.device | None = None,
    ):
        self.batches, self.function, self.progress, self.device = batches, function, progress, device

    def __call__(self, model: nn.Module) -> None:
        if self.function is not None:
            with _in_words("the calibration function failed"):
                self.function(model)
        bar = tqdm(total=len(self.batches), desc="calibrate", disable=None if self.progress else True, leave=False)

        def run(index: int) -> None:
            self.run(model, index)
            bar.update()

        with bar:
            self.each(run)

    def each(self, step: Callable[[int], T]) -> list[T]:
        """What `step`, which runs the model, gives for each batch."""
        return [step(index) for index in range(len(self.batches))]

    def digest(self) -> str:
        """A checksum of the batches."""
        found = hashlib.sha256()
        for batch in self.batches:
            found.update(describe(batch).encode())
            for tensor in tensors_of(batch):
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def run(self, model: nn.Module, index: int) -> None:
        """One batch."""
        device = self.device or next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        what = f"the model failed on calibration batch {index} ({describe(self.batches[index])})"
        try:
            with _in_words(what), self.at(index):
                run_on(model, map_tensors(self.batches[index], lambda t: t.to(device)))
        except CalibrationError as error:
            if str(error).startswith(what):
                raise
            raise CalibrationError(f"{error} (calibration batch {index})") from error.__cause__  # a layer's complaint

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """While it lasts this is the current batch, and `without_padding` leaves out what its attention_mask does."""
        batch = self.batches[index]
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        number, token = _batch.set(index), _mask.set(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
        try:
            yield
        finally:
            _mask.reset(token)
            _batch.reset(number)


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except (Pass, CalibrationError):
        raise
    except Exception as error:
        raise CalibrationError(f"{what}: {type(error).__name__}: {error}") from error


def collect(
    model: nn.Module, layers: dict[str, nn.Module], needs: dict[str, frozenset[str]], run: Runner
) -> dict[str, Stats]:
    """Statistics of the inputs of `layers` (by name) while `run` runs the model.

    Layers that no data reached are not in the result. The model runs in eval mode, and gets its flags back.
    """
    with observed(model):
        stats = _collect(model, layers, needs, run, share=True)
        return _collect(model, layers, needs, run, share=False) if stats is None else stats


@contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """The model as its layers are watched: in eval mode, without gradients and fused paths; its flags come back."""
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no layer, so there would be nothing to see
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in training.items():
            module.training = flag


def _collect(
    model: nn.Module,
    layers: dict[str, nn.Module],
    needs: dict[str, frozenset[str]],
    run: Runner,
    share: bool,
) -> dict[str, Stats] | None:
    """One pass over the data; None if two layers turned out to share only some of their inputs."""
    watch = _Watch(needs, share)
    handles = [m.register_forward_pre_hook(watch.hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        run(model)
    except _NotShared:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return watch.result()


class _Watch:
    """Sees every call of the layers.

    A follower is a layer whose first input was the first input of another, its leader, too. It shares the
    leader's statistics, which is right only while each of its calls gets what the leader's got.
    """

    def __init__(self, needs: dict[str, frozenset[str]], share: bool):
        self.needs, self.share = needs, share
        self.stats: dict[str, Stats] = {}
        self.calls: dict[str, int] = {}
        self.leader_of: dict[str, str] = {}
        self.last: tuple[str, Tensor, int | None] | None = None  # a layer, its input, the input's version
        self.differs = False

    def hook(self, name: str) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = inputs_of(module, args[0] if args else next(iter(kwargs.values())))
            same = self.last is not None and _is_same(x, *self.last[1:])
            leader = self.last[0] if same else None
            if not self._follows(name, leader):
                try:
                    self.stats.setdefault(name, Stats(self.needs[name])).update(without_padding(x))
                except ValueError as error:
                    raise CalibrationError(f"layer '{name or '(the model)'}': {error}") from None
                if not same:
                    self.last = (name, x, _version(x))
            self.calls[name] = self.calls.get(name, 0) + 1

        return see

    def _follows(self, name: str, leader: str | None) -> bool:
        """Whether the statistics of the leader, which just got this layer's input, can stand for its own."""
        if name in self.leader_of:
            if leader == self.leader_of[name] and self.calls[name] + 1 == self.calls[leader]:
                return True
            self.differs = True  # noted, not only raised: the model may catch what is raised in it
            raise _NotShared
        if not self.share or leader in (None, name) or name in self.stats:
            return False
        if self.calls[leader] > 1 or self.needs[name] != self.needs[leader]:
            return False
        self.leader_of[name] = leader
        self.stats[name] = self.stats[leader]
        return True

    def result(self) -> dict[str, Stats] | None:
        if self.differs or any(self.calls[n] != self.calls[leader] for n, leader in self.leader_of.items()):
            return None
        return {name: s for name, s in self.stats.items() if s.tokens}


def current_batch() -> int:
    """The number of the batch that runs; LookupError if the data comes in none."""
    return _batch.get()


def without_padding(x: Tensor) -> Tensor:
    """The tokens of x (B, T, K) that the batch's attention_mask (B, T) keeps; x itself where the shapes do not tell."""
    mask = _mask.get()
    return x if mask is None or mask.shape != x.shape[:-1] else x[mask.to(x.device).bool()]


def _is_same(a: Tensor, b: Tensor, version: int | None) -> bool:
    """Whether `a` holds what `b` held when it had that version."""
    # `b` is held alive, so its memory cannot have been given to another tensor in between.
    return version is not None and (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and _version(a) == version
    )


def _version(x: Tensor) -> int | None:
    """How often it was changed in place; None where torch does not count, in inference mode."""
    return None if x.is_inference() else x._version
