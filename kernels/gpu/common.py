"""What the kernels share: the device of a launch, the order of tiles, products of split floats."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

# Triton reads TRITON_INTERPRET when a kernel is defined, so this is settled for the life of the module.
INTERPRET = triton.knobs.runtime.interpret
# The type of the terms that `split_dot` multiplies. The interpreter keeps bfloat16 as bare 16-bit integers and
# multiplies those, so there the terms stay in float32: the same numbers, since every term is a bfloat16 already.
TERM = tl.constexpr(tl.float32 if INTERPRET else tl.bfloat16)
# Adding 1.5 * 2^23 leaves no bits for a fraction: the hardware rounds to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


# ---- host -----------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A launch that was caught: what Triton needs to compile it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict


class Pretended(NamedTuple):
    """A GPU to prepare launches for that need not be here (see `ahead`): they are noted, and nothing runs."""

    target: GPUTarget
    table: str | None
    launches: list[Launch]


pretended: Pretended | None = None


def launch(kernel, programs: int, x: Tensor, *args, **options) -> None:
    """Run so many programs of a kernel on the device of x, whose first argument is x."""
    if pretended is not None:
        pretended.launches.append(Launch(kernel, (programs,), (x, *args), options))
        return
    with on_device(x):
        kernel[(programs,)](x, *args, **options)


@functools.cache
def _target(device: int) -> GPUTarget:
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()


def target_of(x: Tensor) -> GPUTarget:
    """What the kernels for x are compiled for: backend "cuda" with arch 80, 90.. or "hip" with arch "gfx942".."""
    if pretended is not None:
        return pretended.target
    return _target(x.device.index) if x.is_cuda else GPUTarget("cuda", 80, 32)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors_of(x: Tensor) -> int:
    """How many multiprocessors (compute units) the device of x has."""
    if pretended is not None:
        return 132
    return _processors(x.device.index) if x.is_cuda else 8


def has_assembly(target: GPUTarget) -> bool:
    """Whether `unpack` may use NVIDIA's instructions (bfloat16 arithmetic came with sm_80)."""
    return target.backend == "cuda" and target.arch >= 80 and not INTERPRET


def has_tensor_memory(target: GPUTarget) -> bool:
    """Data-center Blackwell, whose tensor cores add up outside of the registers."""
    return target.backend == "cuda" and 100 <= target.arch < 120


_NOTHING = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make it that of x (which is a CPU tensor under the interpreter)."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)


# Float types, and how many bfloat16 it takes to hold one (see `split_dot`).
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
FLOATS = tuple(TERMS)


# ---- device ---------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile (pid_m, pid_n) of program pid. Programs that run at the same time cover GROUP_M rows of tiles column
    by column, so that they share both tokens and weights in the second-level cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    inside = pid % (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)  # the last group may be shorter
    return group * GROUP_M + inside % rows, inside // rows


@triton.jit
def upper_half(x):
    """x with all but the first 16 bits cleared: a bfloat16, at most as far from 0 as x, and x - upper_half(x) exact."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_terms(x):
    """float32 x = high + mid + low, exactly, each of the three a bfloat16 (three times 8 bits are the 24 of x).

    Infinity is (inf, 0, 0) and not (inf, nan, nan); NaN stays NaN in the sum, whatever its payload. The low terms of
    numbers under 1e-30 may fall under the smallest bfloat16 and are rounded: an error of 1e-40.
    """
    high = upper_half(x)
    rest = tl.where(x == high, 0.0, x - high)
    mid = upper_half(rest)
    return high, mid, rest - mid


@triton.jit
def terms_of(x, TERMS: tl.constexpr):
    """The operands of `split_dot`: as many terms of x as it needs (the rest repeat, and are not used)."""
    if TERMS == 1:
        high = x.to(TERM)
        return high, high, high
    high, mid, low = bfloat16_terms(x.to(tl.float32))
    return high.to(TERM), mid.to(TERM), low.to(TERM)


@triton.jit
def split_dot(a, b, acc, A_TERMS: tl.constexpr, B_TERMS: tl.constexpr):
    """acc + a @ b as good as in float32, from tensor-core products of bfloat16 terms, smallest products first.

    TERMS says how many terms an operand needs: 1 if it holds bfloat16 or small integers, 2 for float16, 3 for
    float32. Tensor cores chop where they add: give a long sum a fresh acc for every step, and add those up outside.
    """
    a1, a2, a3 = terms_of(a, A_TERMS)
    b1, b2, b3 = terms_of(b, B_TERMS)
    if A_TERMS == 3:
        acc = tl.dot(a3, b1, acc)
    if B_TERMS == 3:
        acc = tl.dot(a1, b3, acc)
    if A_TERMS >= 2 and B_TERMS >= 2:
        acc = tl.dot(a2, b2, acc)
    if A_TERMS >= 2:
        acc = tl.dot(a2, b1, acc)
    if B_TERMS >= 2:
        acc = tl.dot(a1, b2, acc)
    return tl.dot(a1, b1, acc)
