"""The libraries that a user would pick instead, each behind one function: a float `nn.Linear` in, theirs out.

    make bench-peers        # installs them into an environment of their own, and times them beside qgraft

All are optional. One that is not installed, cannot run here, fails, or gives a wrong result is reported as
that, with the reason; none is left out in silence.
"""

import contextlib
import copy
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 64  # of the 4-bit weights, where the library lets one choose; that of our schemes
# How far from the float layer, relative, on Gaussian data: 8 bits lose about 1 %, 4 bits with a group of 64 about 10 %.
LIMIT_8, LIMIT_4 = 0.03, 0.2
FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Peer:
    """One way of one library.

    make: takes an `nn.Linear` that it may consume, returns a module that stands in for it.
    limit: the largest relative error, to the float layer, that still counts as right.
    """

    library: str
    scheme: str
    make: Callable[[nn.Linear], nn.Module] = field(repr=False)
    limit: float
    dtypes: tuple[torch.dtype, ...] = FLOATS
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def name(self) -> str:
        return f"{self.library} {self.scheme}"

    def absent(self, device: str) -> str | None:
        """Why it cannot be tried at all, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.version is None:
            return f"{self.library} is not installed (make bench-peers)"
        return None

    @property
    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return None

    def build(self, linear: nn.Linear) -> nn.Module:
        """Their layer, made from a copy of `linear`. Raises whatever the library raises."""
        with unchanged_settings():
            return self.make(copy.deepcopy(linear)).eval()


@contextlib.contextmanager
def unchanged_settings() -> Iterator[None]:
    """Take back what a library may set for the whole process: with TF32 allowed, or fewer threads, the
    baselines would be others than before."""
    precision, threads, dtype = torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


class Compiled(nn.Module):
    """A layer under torch.compile, compiled anew for each number of tokens: what is fastest for it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._by_tokens: dict[int, Callable[[Tensor], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self._by_tokens:
            self._by_tokens[len(x)] = self._compile(len(x))
        return self._by_tokens[len(x)](x)

    def _compile(self, tokens: int) -> Callable[[Tensor], Tensor]:
        layer = self.layer

        def call(x: Tensor) -> Tensor:
            return layer(x)

        # Dynamo counts recompilations by code object and gives up, in silence, after eight: each gets its own.
        call.__code__ = call.__code__.replace(co_name=f"call_{tokens}_{id(layer)}")
        return torch.compile(call, dynamic=False)

    def __deepcopy__(self, memo: dict) -> "Compiled":
        return Compiled(copy.deepcopy(self.layer, memo))  # what is compiled has the weights of this layer inside


def _torchao(config: str, package: str = "torchao.quantization", **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        holder = nn.Sequential(linear)
        quantize_(holder, getattr(importlib.import_module(package), config)(**options))
        return holder[0]

    return make


def _compiled(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Linear], nn.Module]:
    return lambda linear: Compiled(make(linear))


def _quanto(weights: str) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from optimum import quanto

        holder = nn.Sequential(linear)
        quanto.quantize(holder, weights=getattr(quanto, weights))
        quanto.freeze(holder)
        return holder[0]

    return make


def _bitsandbytes(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        n, k = linear.weight.shape
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(k, n, linear.bias is not None, has_fp16_weights=False, threshold=0.0)
        else:
            options = {"compute_dtype": linear.weight.dtype, "quant_type": kind}
            layer = bnb.nn.Linear4bit(k, n, linear.bias is not None, **options)
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.device)  # it quantizes when it is moved

    return make


def _hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        weight = linear.weight
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        return HQQLinear(linear, config, compute_dtype=weight.dtype, device=str(weight.device))

    return make


def _sdnq(weights: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        device = linear.weight.device
        holder = nn.Sequential(linear)
        holder = sdnq_post_load_quant(
            holder, weights_dtype=weights, quantization_device=device, return_device=device, **options
        )
        return holder[0]

    return make


def _gemlite(processor: str, through_hqq: bool = False) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from gemlite import helper

        weight = linear.weight
        make_from = getattr(helper, processor)(device=str(weight.device), dtype=weight.dtype)
        return make_from.from_hqqlinear(_hqq(4)(linear)) if through_hqq else make_from.from_linear(linear)

    return make


_INT8, _DYNAMIC = _torchao("Int8WeightOnlyConfig"), _torchao("Int8DynamicActivationInt8WeightConfig")
_INT4 = "torchao.prototype.quantization.int4"

PEERS = (
    Peer("torchao", "int8wo", _INT8, LIMIT_8),
    Peer("torchao", "int8wo compiled", _compiled(_INT8), LIMIT_8),
    Peer("torchao", "int8dyn", _DYNAMIC, LIMIT_8),
    Peer("torchao", "int8dyn compiled", _compiled(_DYNAMIC), LIMIT_8),
    Peer("torchao", "int4wo",
         _torchao("PrototypeInt4WeightOnlyConfig", _INT4, group_size=GROUP), LIMIT_4, devices=("cpu",)),
    Peer("torchao", "int8dyn int4wo",
         _torchao("Int8DynamicActivationInt4WeightConfig", _INT4, group_size=GROUP), LIMIT_4, devices=("cpu",)),
    Peer("torchao", "int4wo tinygemm",
         _torchao("Int4WeightOnlyConfig", group_size=GROUP, int4_packing_format="tile_packed_to_4d"), LIMIT_4,
         dtypes=(torch.bfloat16,), devices=("cuda",)),
    Peer("optimum-quanto", "qint8", _quanto("qint8"), LIMIT_8),
    Peer("optimum-quanto", "qint4", _quanto("qint4"), LIMIT_4),
    Peer("bitsandbytes", "int8", _bitsandbytes("int8"), LIMIT_8),
    Peer("bitsandbytes", "nf4", _bitsandbytes("nf4"), LIMIT_4),
    Peer("hqq", "8 bit", _hqq(8), LIMIT_8),
    Peer("hqq", "4 bit", _hqq(4), LIMIT_4),
    Peer("sdnq", "int8", _sdnq("int8", use_quantized_matmul=False), LIMIT_8),
    Peer("sdnq", "int8 matmul", _sdnq("int8", use_quantized_matmul=True), LIMIT_8),
    Peer("sdnq", "int4", _sdnq("int4", group_size=GROUP), LIMIT_4),
    Peer("sdnq", "uint4", _sdnq("uint4", group_size=GROUP), LIMIT_4),
    Peer("sdnq", "int4 svd", _sdnq("int4", group_size=GROUP, use_svd=True), LIMIT_4),
    Peer("sdnq", "int4 hadamard", _sdnq("int4", group_size=GROUP, use_hadamard=True), LIMIT_4),
    Peer("sdnq", "uint4 svd hadamard",
         _sdnq("uint4", group_size=GROUP, use_svd=True, use_hadamard=True), LIMIT_4),
    Peer("gemlite", "A16W8", _gemlite("A16W8_INT8"), LIMIT_8,
         dtypes=(torch.bfloat16,), devices=("cuda",)),
    Peer("gemlite", "A16W4", _gemlite("A16W4_HQQ_INT", through_hqq=True), LIMIT_4,
         dtypes=(torch.bfloat16,), devices=("cuda",)),
    Peer("gemlite", "A8W8", _gemlite("A8W8_int8_dynamic"), LIMIT_8,
         dtypes=(torch.bfloat16,), devices=("cuda",)),
    Peer("gemlite", "A8W4", _gemlite("A8W4_HQQ_INT_dynamic", through_hqq=True), LIMIT_4,
         dtypes=(torch.bfloat16,), devices=("cuda",)),
)  # fmt: skip


def chosen(names: list[str] | None) -> list[Peer]:
    """The peers that `names` mean, each a library or a full name; None: all, "none": none.

    Raises ValueError, in words for the user, on a name that is neither.
    """
    if names is None:
        return list(PEERS)
    known: dict[str, list[Peer]] = {"none": []}
    for peer in PEERS:
        known.setdefault(peer.library, []).append(peer)
        known[peer.name] = [peer]
    for name in names:
        if name not in known:
            libraries = ", ".join(dict.fromkeys(peer.library for peer in PEERS))
            raise ValueError(f"'{name}' is no peer: write a library ({libraries}), a full name, or none")
    return list(dict.fromkeys(peer for name in names for peer in known[name]))
