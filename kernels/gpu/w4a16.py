"""W4A16: int4 weights in groups, bfloat16 or float16 activations.

The packed weight is read as 16-bit words of four codes. A word is in the place of one 16-bit operand, so a register
with two of them becomes two operands of the tensor cores for each nibble with a shift, a logic operation and an
addition, and no byte has to move. The price is that nibble q of all words is multiplied at a time: features q, q + 4,
q + 8.. of x. Few tokens are read in words of four numbers and taken apart alike; of many, the kernel that smooths and
rotates them has made four planes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .. import reference
from ..operands import HALF, require
from . import configs
from .common import FLOATS, TERMS, has_assembly, has_tensor_memory, launch, target_of, tile_of
from .dequantize import dequantized_int4
from .epilogue import add_low_rank, store_transposed
from .split_k import share_of, share_out, sum_of_shares
from .svdq_quantize import smooth_and_rotate
from .unpack import halves_of_words

# Up to FEW tokens x is read as it comes. From MANY on, data-center Blackwell leaves the product to torch, because its
# tensor cores want the unpacked weight in a memory of their own.
FEW, MANY = 16, 65


@triton.jit
def load_pieces(row_ptrs, w, groups, GROUP: tl.constexpr, PIECES: tl.constexpr, EACH: tl.constexpr):
    """One value for every EACH words of a tile that starts at word w: that of their group, (rows, PIECES)."""
    group = (w + tl.arange(0, PIECES) * EACH) * 4 // GROUP
    return tl.load(row_ptrs + group[None, :], mask=(group < groups)[None, :], other=0)


@triton.jit
def spread(pieces, ROWS: tl.constexpr, PIECES: tl.constexpr, EACH: tl.constexpr):
    """(ROWS, PIECES) -> (ROWS, PIECES * EACH)."""
    return tl.reshape(tl.broadcast_to(pieces[:, :, None], (ROWS, PIECES, EACH)), (ROWS, PIECES * EACH))


@triton.jit
def numbers(x_words, q: tl.constexpr, dtype: tl.constexpr):
    """Number q of every word of four, in x of few tokens."""
    return (x_words >> (16 * q)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit(do_not_specialize=["M", "splits"])  # or M = 1, 15 and 16 would each be compiled
def w4a16_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, lora_ptr, up_ptr, bias_ptr, y_ptr, workspace_ptr, counter_ptr,
    M, N, WORDS, R, splits,
    GROUP: tl.constexpr, PER_ROW: tl.constexpr, PLANES: tl.constexpr, UP_TERMS: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    #           WORDS = Kp / 4                BLOCK_M
    #         .------------------.            .-------.
    # BLOCK_N | words (4 codes)->|     WORDS  |  x^T  |   acc (BLOCK_N, BLOCK_M) += code q @ number q, q = 0..3,
    #         '------------------'            | words |   stored transposed into y (M, N)
    #                                         '-------'
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tile, split, begin, end = tl.program_id(0), 0, 0, WORDS
    if SPLIT_K:  # `splits` programs in a row share a tile, each with its part of the words
        tile, split = tile // splits, tile % splits
        begin, end = share_of(split, splits, WORDS, BLOCK_W)
    pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = begin + tl.arange(0, BLOCK_W)

    # Rows past the end read the last row again: cheaper than a mask, and never stored.
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    w_ptrs = words_ptr + rows_n[:, None] * WORDS + offs_w[None, :]
    x_ptrs = x_ptr + rows_m[None, :] * (4 * WORDS if PLANES else WORDS) + offs_w[:, None]

    # Scales and zero points of a tile are too few bytes for the pipeline's asynchronous copies, so they are fetched
    # one step ahead by hand. (In pieces of 16 words at most: longer ones take more instructions, not fewer.)
    EACH: tl.constexpr = BLOCK_W // 2 if PER_ROW else min(GROUP // 4, BLOCK_W // 2, 16)
    PIECES: tl.constexpr = BLOCK_W // EACH
    groups = 1 if PER_ROW else WORDS * 4 // GROUP
    BIAS: tl.constexpr = -136.0 if dtype == tl.bfloat16 else -1032.0  # see halves_of_words
    offset = tl.full((BLOCK_N, PIECES), BIAS, dtype)
    if not PER_ROW:
        next_scale = load_pieces(scale_ptr + rows_n[:, None] * groups, begin, groups, GROUP, PIECES, EACH)
        if zero_ptr is not None:
            next_zero = load_pieces(zero_ptr + rows_n[:, None] * groups, begin, groups, GROUP, PIECES, EACH)
    elif zero_ptr is not None:
        offset = (offset.to(tl.float32) - tl.load(zero_ptr + rows_n)[:, None].to(tl.float32)).to(dtype)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for w in range(begin, end, BLOCK_W):
        if EVEN_K:
            words = tl.load(w_ptrs)
            x0 = tl.load(x_ptrs)
        else:
            words = tl.load(w_ptrs, mask=(offs_w < WORDS + begin - w)[None, :], other=0)
            x0 = tl.load(x_ptrs, mask=(offs_w < WORDS + begin - w)[:, None], other=0)
        if not PLANES:
            x0, x1, x2, x3 = numbers(x0, 0, dtype), numbers(x0, 1, dtype), numbers(x0, 2, dtype), numbers(x0, 3, dtype)
        elif EVEN_K:
            x1, x2, x3 = tl.load(x_ptrs + WORDS), tl.load(x_ptrs + 2 * WORDS), tl.load(x_ptrs + 3 * WORDS)
        else:
            x1 = tl.load(x_ptrs + WORDS, mask=(offs_w < WORDS + begin - w)[:, None], other=0)
            x2 = tl.load(x_ptrs + 2 * WORDS, mask=(offs_w < WORDS + begin - w)[:, None], other=0)
            x3 = tl.load(x_ptrs + 3 * WORDS, mask=(offs_w < WORDS + begin - w)[:, None], other=0)
        if not PER_ROW:
            scale = spread(next_scale.to(dtype), BLOCK_N, PIECES, EACH)
            next_scale = load_pieces(scale_ptr + rows_n[:, None] * groups, w + BLOCK_W, groups, GROUP, PIECES, EACH)
            if zero_ptr is not None:
                offset = (BIAS - next_zero.to(tl.float32)).to(dtype)
                next_zero = load_pieces(zero_ptr + rows_n[:, None] * groups, w + BLOCK_W, groups, GROUP, PIECES, EACH)
        c0, c1, c2, c3 = halves_of_words(words, spread(offset, BLOCK_N, PIECES, EACH), ASM)
        if not PER_ROW:
            c0, c1, c2, c3 = c0 * scale, c1 * scale, c2 * scale, c3 * scale
        acc = tl.dot(c0, x0, acc)
        acc = tl.dot(c1, x1, acc)
        acc = tl.dot(c2, x2, acc)
        acc = tl.dot(c3, x3, acc)
        w_ptrs += BLOCK_W
        x_ptrs += BLOCK_W

    last = True
    if SPLIT_K:
        acc, last = sum_of_shares(acc, workspace_ptr, counter_ptr, tile, split, splits, BLOCK_N, BLOCK_M)
    if last:
        if PER_ROW:
            acc *= tl.load(scale_ptr + rows_n).to(tl.float32)[:, None]
        if up_ptr is not None:
            acc = add_low_rank(acc, lora_ptr, up_ptr, rows_m, rows_n, R, 2, UP_TERMS, BLOCK_R)
        store_transposed(acc, bias_ptr, y_ptr, offs_m, offs_n, M, N)


def config(m: int, words: int, target: GPUTarget) -> dict[str, int]:
    """Tiles for m tokens and rows of so many words; BLOCK_W counts words, four codes each."""
    cuda, hopper = target.backend == "cuda", target.backend == "cuda" and target.arch == 90
    if m <= FEW // 2 and cuda and target.arch >= 90:
        tile = dict(BLOCK_M=8, BLOCK_N=64, BLOCK_W=128, num_warps=4, num_stages=4)
    elif m <= FEW // 2 and cuda:
        tile = dict(BLOCK_M=8, BLOCK_N=32, BLOCK_W=64, num_warps=2, num_stages=4)
    elif m <= FEW and hopper:
        tile = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_W=128, num_warps=4, num_stages=3)
    elif m <= FEW:  # two warps: to four of them the compiler gives instructions that are made for larger tiles
        tile = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_W=64, num_warps=2, num_stages=4)
    elif has_tensor_memory(target):  # taken apart, a weight would have to go there and back
        tile = dict(BLOCK_M=64, BLOCK_N=32, BLOCK_W=32, num_warps=2, num_stages=3)
    elif m <= 64:
        tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_W=32, num_warps=4, num_stages=3)
    elif hopper or not cuda:
        tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_W=32, num_warps=8, num_stages=3)
    else:  # with an accumulator of 128 x 128 the rest does not fit in the registers
        tile = dict(BLOCK_M=64, BLOCK_N=128, BLOCK_W=32, num_warps=8, num_stages=3)
    if words % 8:  # rows that start anywhere are loaded word by word: fewer at a time, or their addresses spill
        tile |= dict(BLOCK_W=16, BLOCK_M=min(tile["BLOCK_M"], 32))
    if target.backend == "hip":
        tile |= dict(num_stages=2, BLOCK_W=min(tile["BLOCK_W"], 64))
    return tile | dict(BLOCK_R=32, GROUP_M=8)


def w4a16_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    rotate: bool,
) -> Tensor:
    """See :func:`qgraft.kernels.reference.w4a16_linear`; x is bfloat16 or float16, and scale * (code - zero_point) is
    rounded to its type, in which tensor cores take it (one scale a row comes after the sum, in float32).

    From `configs.matmul_from` tokens on, torch multiplies; the branch is rounded to x's type before it is added then.
    A float32 x goes through plain torch, where nothing is rounded.
    """
    op = "w4a16_linear"
    if x.dtype is torch.float32:
        return reference.w4a16_linear(
            x, qweight, scale, zero_point, smooth_factor, proj_down, proj_up, bias, group_size, rotate
        )
    (m, k), (n, half), dtype = x.shape, qweight.shape, x.dtype
    padded, words = 2 * half, half // 2
    if half % 2 or padded % group_size or (group_size != padded and group_size not in (16, 32, 64, 128, 256)):
        raise ValueError(
            f"{op}: group_size must be 16, 32, 64, 128 or 256, or the whole row if that is a multiple of 4; "
            f"got {group_size} for rows of {padded}"
        )
    if padded < k:
        raise ValueError(f"{op}: qweight holds {padded} input features, x has {k}")
    x = require(op, x, "x", x, HALF, m, k)
    qweight = require(op, x, "qweight", qweight, (torch.uint8,), n, half)
    scale = require(op, x, "scale", scale, FLOATS, n, padded // group_size)
    zero_point = require(op, x, "zero_point", zero_point, (torch.int8,), n, padded // group_size)
    bias = require(op, x, "bias", bias, FLOATS, n)
    if m * n == 0:
        return x.new_empty(m, n)
    target = target_of(x)
    by_torch = m >= (MANY if has_tensor_memory(target) else configs.matmul_from("w4a16", x))
    planes = 1 if m <= FEW or by_torch else 4
    x, lora_act = smooth_and_rotate(
        x, smooth_factor, None if proj_up is None else proj_down, padded, group_size, rotate, planes
    )
    rank = lora_act.shape[1]
    proj_up = require(op, x, "proj_up", proj_up, FLOATS, n, rank) if rank else None
    qweight = in_words(qweight, torch.int16)
    if by_torch:
        weight = dequantized_int4(qweight, scale, zero_point, group_size, x.dtype).t()
        y = torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
        return y if proj_up is None else y.addmm_(lora_act.to(x.dtype), proj_up.to(x.dtype).t())
    if planes == 1:
        x = in_words(x, torch.int64)
    tile = configs.tile("w4a16", x, m, n, padded, config, m, words, target)
    y = qweight.new_empty(m, n, dtype=dtype)
    programs, splits, shares, counters = share_out(x, m, n, words, tile, tile["BLOCK_W"], torch.float32)
    launch(
        w4a16_kernel, programs, x, qweight, scale, zero_point, lora_act, proj_up, bias, y, shares, counters,
        m, n, words, rank, splits,
        GROUP=group_size, PER_ROW=group_size == padded, PLANES=planes > 1,
        UP_TERMS=1 if proj_up is None else TERMS[proj_up.dtype],
        EVEN_K=words % tile["BLOCK_W"] == 0, SPLIT_K=splits > 1, ASM=has_assembly(target) and words % 8 == 0,
        **tile,
    )  # fmt: skip
    return y


def in_words(tensor: Tensor, word: torch.dtype) -> Tensor:
    """The same memory seen as larger numbers; a copy where it does not start at a multiple of their size."""
    if tensor.storage_offset() * tensor.element_size() % word.itemsize:
        tensor = tensor.clone()
    return tensor.view(word)
