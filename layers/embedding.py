"""What takes the place of an `nn.Embedding`: rows of int8 or int4 codes, dequantized as they are looked up.

The codes are those that a linear layer over the same weight would hold, so an output head that is tied to the
embedding can go on sharing them.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..kernels import reference
from .base import QuantLayer, QuantLinear, Scheme, check_weight
from .w4a16 import W4A16Linear
from .w8a16 import W8A16Linear

EMBEDDINGS: dict[str, type["QuantEmbedding"]] = {}


class EmbeddingScheme(Scheme):
    def fits(self, head: str, scheme: Scheme) -> bool:
        """Whether a linear layer of scheme `head`, with these options, reads the codes of the embedding."""
        raise NotImplementedError

    def heads(self) -> str:
        """The linear schemes that do, in words."""
        raise NotImplementedError


class EmbeddingW8Scheme(EmbeddingScheme):
    """Symmetric int8, one scale a row."""

    def fits(self, head: str, scheme: Scheme) -> bool:
        return head in ("w8a16", "w8a32")

    def heads(self) -> str:
        return "w8a16 or w8a32"


class EmbeddingW4Scheme(EmbeddingScheme):
    """Symmetric int4 in groups, one 16-bit scale each."""

    group_size: Literal[32, 64, 128] = Field(64, description="columns that share a scale, and the rotation's size")
    rotate: bool = Field(True, description="codes are those of the rows after a Hadamard rotation inside each group")

    def fits(self, head: str, scheme: Scheme) -> bool:
        if head != "w4a16" or scheme.rounding == "gptq":
            return False
        return scheme.model_dump() == self.as_w4a16() | {"rounding": scheme.rounding}

    def heads(self) -> str:
        rotate = str(self.rotate).lower()
        return f"w4a16 with group_size: {self.group_size}, rotate: {rotate}, without zero_point, rank or gptq"

    def as_w4a16(self) -> dict[str, Any]:
        """The options of the linear layer with the same codes."""
        options = {"group_size": self.group_size, "rotate": self.rotate, "rounding": "rtn"}
        return W4A16Linear.Scheme(**options).model_dump()


class QuantEmbedding(QuantLayer):
    """An embedding with quantized rows. `padding_idx` is kept; its row is zero if it was.

    num_embeddings, embedding_dim: any sizes >= 1, called V and D.
    dtype: the nominal type, that of the output.
    """

    Scheme: ClassVar[type[EmbeddingScheme]]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scheme: Scheme | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"an embedding needs at least one row and column, got {num_embeddings} x {embedding_dim}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scheme = self.make_scheme(scheme, **options)
        self.dtype = dtype or torch.get_default_dtype()
        self.report: Any = None
        for name, buffer in self._as_linear(device)._buffers.items():
            if buffer is not None:
                self.register_buffer(name, buffer)

    def _as_linear(self, device: torch.device | str | None) -> QuantLinear:
        """An empty linear layer whose codes are the same."""
        raise NotImplementedError

    def _rows(self, ids: Tensor) -> Tensor:
        """ids (M,) -> (M, D) float32."""
        raise NotImplementedError

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, scheme: Scheme | None = None, **options: Any) -> Self:
        """Quantize an embedding, which is not changed; usable alone, without a Quantizer.

        Raises ValueError for a bad option, and for a weight that is on meta or not finite.
        """
        weight = embedding.weight.detach()
        check_weight(weight)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            scheme=scheme,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        layer.train(embedding.training)
        with torch.no_grad():
            layer.quantize(weight)
        return layer

    def quantize(self, weight: Tensor) -> None:
        """Fill the buffers from a float weight (V, D)."""
        linear = self._as_linear(weight.device)
        linear.quantize(weight)
        for name in self._buffers:
            self._buffers[name] = linear._buffers[name]

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids of any shape (*) -> (*, D) in the nominal dtype. IndexError for an id outside the table."""
        return self._rows(ids.reshape(-1)).to(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.scheme)
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{options}"


def _register(name: str):
    def add(cls: type[QuantEmbedding]) -> type[QuantEmbedding]:
        cls.scheme_name = name
        EMBEDDINGS[name] = cls
        return cls

    return add


@_register("embedding_w8")
class EmbeddingW8(QuantEmbedding):
    """Rows of int8, in place of an `nn.Embedding`; a tied head can share them.

    qweight  (V, D)  int8 in [-127, 127]  as in W8A16Linear and W8A32Linear
    scale    (V,)    float32
    """

    Scheme = EmbeddingW8Scheme

    def _as_linear(self, device: torch.device | str | None) -> QuantLinear:
        return W8A16Linear(self.embedding_dim, self.num_embeddings, bias=False, device=device, dtype=self.dtype)

    # Not indexing, here and below: that would take a negative id for one from the end.
    def _rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.qweight).float() * F.embedding(ids, self.scale[:, None])

    def dequantize(self) -> Tensor:
        """The effective weight, (V, D) float32."""
        return reference.w8_dequantize(self.qweight, self.scale)


@_register("embedding_w4")
class EmbeddingW4(QuantEmbedding):
    """Rows of int4 in groups, in place of an `nn.Embedding`; a tied head can share them.

    qweight  (V, Dp // 2)  uint8, two codes a byte, as in W4A16Linear; Dp is D padded to whole groups
    scale    (V, Dp // G)  the layer's 16-bit type
    """

    Scheme = EmbeddingW4Scheme

    def _as_linear(self, device: torch.device | str | None) -> QuantLinear:
        options = self.scheme.as_w4a16()
        return W4A16Linear(
            self.embedding_dim, self.num_embeddings, bias=False, device=device, dtype=self.dtype, **options
        )

    def _rows(self, ids: Tensor) -> Tensor:
        return self._dequantize(F.embedding(ids, self.qweight), F.embedding(ids, self.scale))

    def dequantize(self) -> Tensor:
        """The effective weight, (V, D) float32."""
        return self._dequantize(self.qweight, self.scale)

    def _dequantize(self, qweight: Tensor, scale: Tensor) -> Tensor:
        s = self.scheme
        return reference.w4a16_dequantize(
            self.embedding_dim, qweight, scale, None, None, None, None, s.group_size, s.rotate
        )
