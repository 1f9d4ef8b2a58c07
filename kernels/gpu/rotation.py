"""The Hadamard rotation inside each group, on tensor cores: its matrix is +1 and -1, exact in any type."""

import triton
import triton.language as tl

from .common import split_dot

# The largest Hadamard matrix that is held whole; bigger ones are made of its sums and differences.
HADAMARD_BASE = tl.constexpr(64)


@triton.jit
def hadamard_signs(SIZE: tl.constexpr):
    """The Sylvester Hadamard matrix without its 1 / sqrt(SIZE), (SIZE, SIZE) of +1 and -1; SIZE <= 256."""
    index = tl.arange(0, SIZE)
    bits = index[:, None] & index[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1 - 2 * (bits & 1)


@triton.jit
def butterfly(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Rows [a, b] of two halves, each rotated already -> [a + b, a - b]: one step up in the size of the matrix."""
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))  # (ROWS, HALF) each
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, 2 * HALF))


@triton.jit
def rotate_groups(x, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, X_TERMS: tl.constexpr):
    """Every row of x (BLOCK_G, GROUP) times the orthonormal Hadamard matrix; GROUP <= 256."""
    BASE: tl.constexpr = min(GROUP, HADAMARD_BASE)
    ROWS: tl.constexpr = BLOCK_G * GROUP // BASE
    zeros = tl.zeros((ROWS, BASE), dtype=tl.float32)
    x = split_dot(tl.reshape(x, (ROWS, BASE)), hadamard_signs(BASE), zeros, X_TERMS, 1)
    if GROUP > BASE:
        x = butterfly(x, ROWS // 2, BASE)
    if GROUP > 2 * BASE:
        x = butterfly(x, ROWS // 4, 2 * BASE)
    return tl.reshape(x, (BLOCK_G, GROUP)) * GROUP**-0.5
