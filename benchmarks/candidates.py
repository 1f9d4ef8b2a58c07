"""What takes part in a measurement: F.linear, our layers and peers, each built, warmed up and weighed."""

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.layers import SCHEMES, storage_bytes

from . import gate, memory
from .gate import Errors
from .peers import FLOATS, Compiled, Peer

# The types of input that a scheme of ours is timed with: those of the models that it is for; others with both.
INPUTS = {
    "w8a32": (torch.float32,),
    "w8a16": (torch.bfloat16,),
    "w4a16": (torch.bfloat16,),
    "w4a16_asym": (torch.bfloat16,),
}
# A peer whose call takes more seconds than this, and more than so many calls of F.linear, is not timed with this
# number of tokens or more: some libraries have cases that fall to code which would take minutes.
SLOW, SLOWER_THAN_FLOAT = 0.5, 20
CALIBRATION = 512  # tokens, for the schemes that need them


@dataclass
class Candidate:
    """A layer that is called with input of one type.

    check: the errors of an output, given the input. tokens: the numbers of rows that it can be timed with.
    weight_bytes: of its tensors as made. held_bytes: of its tensors after it has run with all of `tokens`, packed
    copies that it keeps included. resident_bytes: by how much the process has grown for it then; None if unknown.
    """

    library: str
    scheme: str
    dtype: torch.dtype
    layer: nn.Module
    check: Callable[[Tensor, Tensor], Errors] = field(repr=False)
    weight_bytes: int
    held_bytes: int
    resident_bytes: int | None = None
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class NotRun:
    """What has no time, and why. tokens: () if it could not be made at all."""

    library: str
    scheme: str
    dtype: str
    tokens: tuple[int, ...]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tokens": list(self.tokens)}


def not_run_in_words(item: dict[str, Any]) -> str:
    """item: a `NotRun` as it is in the JSON."""
    rows = f", {', '.join(map(str, item['tokens']))} tokens" if item["tokens"] else ""
    return f"not run: {item['library']} {item['scheme']}, {item['dtype']}{rows}: {item['reason']}"


class Candidates:
    """All candidates for one weight of shape (N, K), and those that had to stay out."""

    def __init__(self, n: int, k: int, tokens: Sequence[int], device: str):
        self.device = device
        self.linears = _float_layers(n, k, device)
        self.inputs = {
            m: {dtype: torch.randn(m, k, device=device).to(dtype) for dtype in FLOATS} for m in sorted(set(tokens))
        }
        self.all: list[Candidate] = []
        self.not_run: list[NotRun] = []
        self._float_seconds: dict[tuple[torch.dtype, int], float] = {}
        for dtype, linear in self.linears.items():
            check = _other(linear, gate.FORMULA_LIMIT[dtype])
            size = storage_bytes(linear)
            candidate = Candidate("torch", "F.linear", dtype, linear, check, size, size, size, list(self.inputs))
            for m, inputs in self.inputs.items():
                self._float_seconds[dtype, m] = self._seconds(linear, inputs[dtype])
            self.all.append(candidate)

    def add_scheme(self, scheme: str) -> None:
        """One of ours. Whatever it raises is raised: it would be a bug."""
        self._load(lambda linear: quantized(scheme, linear))
        for dtype in INPUTS.get(scheme, FLOATS):
            linear = self.linears[dtype]

            def make(linear: nn.Linear = linear, dtype: torch.dtype = dtype) -> Candidate:
                layer = quantized(scheme, linear)
                size = storage_bytes(layer)
                check = lambda x, y: gate.check(layer, linear, x, y)  # noqa: E731
                candidate = Candidate("qgraft", scheme, dtype, layer, check, size, size)
                for m, inputs in self.inputs.items():
                    layer(inputs[dtype])
                    candidate.tokens.append(m)
                return candidate

            self._weigh(make)

    def add_peer(self, peer: Peer) -> None:
        """One way of another library; what keeps it out is noted in `not_run`."""
        why = peer.absent(self.device)
        if why is None:
            with contextlib.suppress(Exception):  # what it raises here it raises again below, where it is noted
                self._load(peer.build)
        for dtype in peer.dtypes:
            out = [] if why is None else [((), why)]
            if why is None:
                try:
                    self._weigh(lambda dtype=dtype, out=out: self._make_peer(peer, dtype, out))
                except Exception as error:  # it may raise anything, and that it did is what the report wants
                    out.append(((), in_words(error)))
            name = str(dtype).removeprefix("torch.")
            self.not_run += [NotRun(peer.library, peer.scheme, name, *reason) for reason in out]

    def _make_peer(self, peer: Peer, dtype: torch.dtype, out: list) -> Candidate:
        linear = self.linears[dtype]
        layer = peer.build(linear)
        size = memory.tensor_bytes(layer)
        candidate = Candidate(peer.library, peer.scheme, dtype, layer, _other(linear, peer.limit), size, size)
        for m, inputs in self.inputs.items():
            try:
                seconds, base = self._seconds(layer, inputs[dtype]), self._float_seconds[dtype, m]
            except Exception as error:
                out.append(((m,), in_words(error)))
                continue
            if seconds > max(SLOW, SLOWER_THAN_FLOAT * base):
                reason = f"too slow: a call with {m} tokens took {seconds:.2g} s, F.linear {base:.1g} s"
                out.append((tuple(rows for rows in self.inputs if rows >= m), reason))
                break
            candidate.tokens.append(m)
        return candidate

    def _load(self, build: Callable[[nn.Linear], nn.Module]) -> None:
        """Build and call a small one first: the code that this loads is not what a layer weighs."""
        side = 256
        layer = build(nn.Linear(side, side, device=self.device))
        if not isinstance(layer, Compiled):
            layer(torch.randn(2, side, device=self.device))

    def _weigh(self, make: Callable[[], Candidate]) -> None:
        candidate, candidate.resident_bytes = memory.held_by(make, self.device)
        candidate.held_bytes = memory.tensor_bytes(candidate.layer)
        self.all.append(candidate)

    def _seconds(self, layer: nn.Module, x: Tensor) -> float:
        """Of a call that is not the first, which may pack or compile; of the second, if even that is slow."""
        for _ in range(2):
            start = time.perf_counter()
            layer(x)
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return seconds


def quantized(scheme: str, linear: nn.Linear) -> nn.Module:
    """Our layer, made without data unless it cannot do without: how fast it is does not depend on them."""
    cls, weight, data = SCHEMES[scheme], linear.weight, None
    if cls.make_scheme().needs_data():
        data = torch.randn(CALIBRATION, linear.in_features, device=weight.device, dtype=weight.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how much a random weight loses; the error stands in the table
        return cls.from_linear(linear, calibration=data)


def in_words(error: Exception) -> str:
    """The kind of an error and the first line of what it says, cut where a line gets long."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _other(linear: nn.Linear, limit: float) -> Callable[[Tensor, Tensor], Errors]:
    return lambda x, y: gate.check_other(linear, x, y, limit)


def _float_layers(n: int, k: int, device: str) -> dict[torch.dtype, nn.Linear]:
    """The same Gaussian weight in every float type."""
    exact = nn.Linear(k, n, device=device)
    exact.weight.data.normal_(std=k**-0.5)
    layers = {dtype: nn.Linear(k, n, device=device, dtype=dtype) for dtype in FLOATS}
    for layer in layers.values():
        layer.load_state_dict(exact.state_dict())
    return layers
