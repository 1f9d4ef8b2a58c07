"""The contract of a quantized layer, and the registry that recipes name layers by."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from typing_extensions import Self

from .pointwise import features_first, features_last
from .stats import Stats


class Scheme(BaseModel):
    """The options of a layer, as a recipe or a keyword gives them. Each layer class has its own subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def check_shape(self, in_features: int, out_features: int) -> None:
        """Raise ValueError, in words for the user, if a layer of this shape cannot have these options."""

    def needs_data(self) -> str:
        """Why these options cannot do without calibration data, or ""."""
        return ""

    def note(self) -> str:
        """What the plan should tell of these options before the work begins, or ""."""
        return ""


class Unsuitable(ValueError):
    """This weight cannot be given what the options ask for; the float layer is the better one to keep."""


SCHEMES: dict[str, type["QuantLinear"]] = {}


def register(name: str) -> Callable[[type["QuantLinear"]], type["QuantLinear"]]:
    """Class decorator: makes a layer known to recipes under `name`."""

    def add(cls: type["QuantLinear"]) -> type["QuantLinear"]:
        if name in SCHEMES:
            raise ValueError(f"scheme '{name}' is registered already, by {SCHEMES[name].__name__}")
        cls.scheme_name = name
        SCHEMES[name] = cls
        return cls

    return add


class QuantLayer(nn.Module):
    """What all quantized layers have in common: a checked scheme, state in plain buffers, a nominal dtype.

    Casting (`.half()`, `.to(torch.bfloat16)`) changes the nominal `dtype` and the parameters, such as a bias; codes,
    scales and the low-rank branch keep the types that they were quantized with, because a scale in float16 is
    another scale.
    """

    scheme_name: ClassVar[str]
    Scheme: ClassVar[type[Scheme]] = Scheme
    # What `Stats` to collect when calibration data is given.
    needs: ClassVar[frozenset[str]] = frozenset()
    # Layers that hold some of the very same buffers; see tie().
    tied_to: tuple["QuantLayer", ...] = ()

    def dequantize(self) -> Tensor:
        """The effective weight, (N, K) float32."""
        raise NotImplementedError

    @classmethod
    def make_scheme(cls, scheme: Scheme | None = None, **options: Any) -> Scheme:
        """A checked Scheme from keywords; ValueError names each bad option."""
        if scheme is not None:
            if options:
                raise ValueError(f"{cls.__name__}: give either scheme= or options, not both: {sorted(options)}")
            if not isinstance(scheme, cls.Scheme):
                raise ValueError(f"{cls.__name__} takes a {cls.__name__}.Scheme, got {type(scheme).__name__}")
            return scheme
        try:
            return cls.Scheme(**options)
        except ValidationError as error:
            problems = "; ".join(_in_words(e) for e in error.errors())
            raise ValueError(
                f"{cls.__name__}: {problems} (options: {', '.join(cls.Scheme.model_fields) or 'none'})"
            ) from None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (N, K) in the nominal dtype, computed at each access; read-only.

        It is here for code that peeks at `.weight.dtype` or `.weight.device`. To change it, quantize again.
        """
        return self.dequantize().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for other in self.tied_to:  # which each move on their own; the last to arrive takes what is there
            _share(other, self)
        return self


def tie(owner: QuantLayer, other: QuantLayer) -> None:
    """Let `other` hold the buffers of `owner` instead of its own of the same names, wherever the two are moved."""
    # Past nn.Module's __setattr__: the one is no submodule of the other.
    owner.__dict__["tied_to"] = (*owner.tied_to, other)
    other.__dict__["tied_to"] = (*other.tied_to, owner)
    _share(owner, other)


def _share(owner: QuantLayer, other: QuantLayer) -> None:
    for name, buffer in owner._buffers.items():
        if buffer is not None and name in other._buffers and other._buffers[name].device == buffer.device:
            other._buffers[name] = buffer


class QuantLinear(QuantLayer):
    """A linear layer with quantized weights: what takes the place of an `nn.Linear`.

    A subclass declares `Scheme`, and writes `_allocate` (its buffers), `quantize` (fill them), `_linear` (the
    forward on 2-D input) and `dequantize`. Quantized state is plain buffers, so state_dict, safetensors, deepcopy,
    meta tensors and torch.compile work as for any module. `bias` stays the parameter it was.

    in_features, out_features: any sizes >= 1; padding is inside.
    scheme: a `Scheme` of this class; or give its fields as keywords. Raises ValueError on a bad one.
    dtype: the nominal type, that of the `nn.Linear` replaced.
    """

    # That of the 1x1 convolution in whose place the layer stands: it takes (*, K, H, W) then. None: a linear layer.
    stride: tuple[int, int] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a layer needs at least one feature on each side, got {in_features} -> {out_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = self.make_scheme(scheme, **options)
        self.scheme.check_shape(in_features, out_features)
        self.dtype = dtype or torch.get_default_dtype()
        # Error, size and time of the quantization, filled in by the Quantizer; rides along in deepcopy and pickle.
        self.report: Any = None
        self._allocate(torch.empty(0, device=device).device)
        for name in [name for name, buffer in self._buffers.items() if buffer is None]:
            self._buffers[name] = self._buffers.pop(name)  # to the end: torch.export miscounts those that follow a None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype))
        else:
            self.register_parameter("bias", None)

    # -- what a subclass writes ---------------------------------------------------------------------------------------

    def _allocate(self, device: torch.device) -> None:
        """Register the buffers, empty, in their final shapes."""
        raise NotImplementedError

    def quantize(self, weight: Tensor, stats: Stats | None = None) -> None:
        """Fill the buffers from a float weight (N, K); `stats` of the inputs, if there are any, improve it."""
        raise NotImplementedError

    def _linear(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N) in x's dtype."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The effective weight, (N, K) float32: what the layer multiplies by, rounding of activations aside."""
        raise NotImplementedError

    # -- what it gets for it ------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme | None = None,
        *,
        stats: Stats | None = None,
        calibration: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Quantize a linear layer; usable alone, without a Quantizer.

        linear: a float `nn.Linear` on any device; it is not changed, and its bias parameter is shared.
        calibration: inputs (*, K) to take statistics from; or give ready `stats`.
        options: fields of the layer's Scheme, such as rank=64.
        Raises ValueError for a bad option, and for a weight that is on meta or not finite.
        """
        weight = linear.weight.detach()
        check_weight(weight)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            scheme=scheme,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        if calibration is not None:
            if stats is not None:
                raise ValueError("give either stats= or calibration=, not both")
            stats = Stats(cls.needs)
            stats.update(calibration)
        layer.bias = linear.bias
        layer.train(linear.training)
        with torch.no_grad():
            layer.quantize(weight, stats)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(*, K) -> (*, N) in x's dtype: any leading shape, none (1-D) and empty ones too, any strides.

        With `stride`, (K, H, W) -> (N, H', W') or (B, K, H, W) -> (B, N, H', W').
        """
        if self.stride is None:
            return self._features(x)
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_features:
            raise ValueError(
                f"{type(self).__name__} in the place of a convolution takes input of shape (B, {self.in_features}, "
                f"H, W), with or without B, got {tuple(x.shape)}"
            )
        return features_first(self._features(features_last(x, self.stride)), x)

    def _features(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes floating-point input of shape (*, {self.in_features}), "
                f"got {tuple(x.shape)} {x.dtype}"
            )
        if x.ndim == 2:  # a reshape takes a microsecond, whether or not there is something to do
            return self._linear(x.contiguous())
        y = self._linear(x.reshape(-1, self.in_features).contiguous())
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.scheme)
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        stride = "" if self.stride is None else f", stride={self.stride}"
        return f"{sizes}, bias={self.bias is not None}{stride}{options}"


def check_weight(weight: Tensor) -> None:
    """ValueError for a weight that is not there or not finite."""
    if weight.is_meta:
        raise ValueError("the weight is on the meta device: load the model's weights first")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values")


def _in_words(error: dict[str, Any]) -> str:
    if error["type"] == "value_error":  # two options that exclude each other, said by the Scheme itself
        return str(error["ctx"]["error"])
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def storage_bytes(module: nn.Module) -> int:
    """Bytes of a module's own and its children's parameters and buffers, each tensor once; works on meta."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
