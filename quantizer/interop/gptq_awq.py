"""GPTQ checkpoints (AutoGPTQ, GPTQModel) and AWQ checkpoints (AutoAWQ, GEMM layout), to our layers.

GPTQ, checkpoint_format "gptq" (v1) or "gptq_v2":

    qweight  int32 (K * bits / 32, N)       codes packed along K, lowest bits first
    qzeros   int32 (groups, N * bits / 32)  zero points packed along N; in v1 one was subtracted from each, in whole
                                            words, so that a zero point of 0 borrowed from its neighbour
    scales   float (groups, N)
    g_idx    int32 (K,)                     the group of each input feature; with desc_act they are not in order

AWQ, version "gemm":

    qweight  int32 (K, N / 8)               codes packed along N; nibble i of a word is its column 0 2 4 6 1 3 5 7 [i]
    qzeros   int32 (groups, N / 8)          likewise
    scales   float (groups, N)

    w[n, k] = scales[g, n] * (code[k, n] - zero[g, n])        codes and zero points without a sign
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...layers import QuantLinear
from .foreign_config import AWQ, GPTQ, checked
from .packed import unpack, words
from .stored import group_size_for, in_groups, weight_only

# Where the columns 0 to 7 of a word of AWQ stand: nibble i holds column ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class GPTQReader:
    """See `foreign.Reader`. Layers are quantized that have a `qweight`, whatever the config lists."""

    def __init__(self, config: Mapping[str, Any]):
        said = checked(GPTQ, config)
        self.bits, self.group_size = _bits_and_groups(said, (2, 4, 8))
        form = said.checkpoint_format or said.format or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format {form!r}; gptq and gptq_v2 can be read")
        for name, rule in (said.dynamic or {}).items():
            if not name.startswith("-") and isinstance(rule, Mapping) and {"bits", "group_size"} & rule.keys():
                raise ValueError(f"dynamic: {name!r} gives layers other bits or groups, which is not read yet")
        self.v1 = form == "gptq"

    def settings(self, name: str, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
        return {} if "qweight" in kinds else None

    def expected(self, settings: Any, shape: tuple[int, int], kinds: Mapping[str, Any]) -> dict[str, tuple]:
        (n, k), bits = shape, self.bits
        if k * bits % 32 or n * bits % 32:
            raise ValueError(f"{n} x {k} codes of {bits} bits fill no whole words")
        groups = -(-k // self.group_size) if self.group_size else 1
        tensors = {
            "qweight": ((words(k, bits), n), torch.int32),
            "qzeros": ((groups, words(n, bits)), torch.int32),
            "scales": ((groups, n), None),
        }
        if "g_idx" in kinds:
            tensors["g_idx"] = ((k,), torch.int32)
        return tensors

    def build(
        self, settings: Any, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantLinear:
        (n, k), bits = shape, self.bits
        codes = unpack(tensors["qweight"].t().contiguous(), bits, k)  # (N, K), with a sign
        qzeros = tensors["qzeros"]
        if self.v1:
            qzeros = qzeros + sum(1 << shift for shift in range(0, 32, bits))  # wraps, as the subtraction did
        zero = unpack(qzeros, bits, n)  # (groups, N)
        order = None
        if self.group_size and "g_idx" in tensors:
            codes, order = in_groups(codes, tensors["g_idx"], self.group_size)
        return weight_only(
            codes,
            tensors["scales"].t().contiguous(),
            zero.t().contiguous(),
            self.group_size,
            bits,
            dtype,
            order=order,
            bias=tensors.get("bias"),
        )


class AWQReader:
    """See `foreign.Reader`. Layers are quantized that have a `qweight`."""

    def __init__(self, config: Mapping[str, Any]):
        said = checked(AWQ, config)
        self.bits, self.group_size = _bits_and_groups(said, (4,))
        version = (said.version or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"version {version!r} of AWQ; gemm can be read")
        self.zero_point = said.zero_point

    def settings(self, name: str, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
        return {} if "qweight" in kinds else None

    def expected(self, settings: Any, shape: tuple[int, int], kinds: Mapping[str, Any]) -> dict[str, tuple]:
        n, k = shape
        size = self.group_size or k
        if n % 8 or k % size:
            raise ValueError(f"{n} x {k} is not whole words of 8 columns and whole groups of {size} rows")
        tensors = {"qweight": ((k, n // 8), torch.int32), "scales": ((k // size, n), None)}
        if self.zero_point or "qzeros" in kinds:
            tensors["qzeros"] = ((k // size, n // 8), torch.int32)
        return tensors

    def build(
        self, settings: Any, tensors: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> QuantLinear:
        codes = _columns(tensors["qweight"]).t().contiguous()  # (N, K)
        zero = tensors.get("qzeros")
        zero = zero if zero is None or not self.zero_point else _columns(zero).t().contiguous()
        scale = tensors["scales"].t().contiguous()
        return weight_only(codes, scale, zero, self.group_size, 4, dtype, bias=tensors.get("bias"))


def _columns(packed: Tensor) -> Tensor:
    """int32 (rows, N / 8) as AWQ packs them -> codes (rows, N) int8, with a sign."""
    codes = unpack(packed.contiguous(), 4, packed.shape[1] * 8).unflatten(1, (-1, 8))
    return torch.empty_like(codes).index_copy_(2, torch.tensor(AWQ_ORDER), codes).flatten(1)


def _bits_and_groups(said: GPTQ | AWQ, known: tuple[int, ...]) -> tuple[int, int | None]:
    if said.bits not in known:
        raise ValueError(f"bits: {said.bits!r}; {', '.join(map(str, known))} can be read")
    if said.group_size in (-1, 0, None):
        return said.bits, None
    group_size_for(said.group_size)
    return said.bits, said.group_size
