"""The native CPU kernels, compiled for every instruction set that this machine has, against the reference."""

import ctypes
import math
import mmap
import os
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from group_scales import LARGEST, random_group_scale

from qgraft.kernels import ops, reference
from qgraft.kernels.cpu import native
from qgraft.kernels.packing import pack_int4, pack_ternary

LIBC = ctypes.CDLL(None)
# Options that take instructions away, so that one machine stands for older ones.
VARIANTS = {
    "native": (),
    "no-bf16": ("-mno-avx512bf16",),
    "no-vnni": ("-mno-avx512vnni", "-mno-avx512bf16"),
    "avx2": ("-mno-avx512f",),
    "avx2-no-vnni": ("-mno-avx512f", "-mno-avxvnni"),
}
TOKENS = [1, 2, 3, 16, 17, 70]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of the output, and room for float32 sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request):
    try:
        return native._load(native.build(VARIANTS[request.param]))
    except native.Unavailable as why:
        if "could not compile" in str(why):
            raise
        pytest.skip(str(why))


@pytest.fixture
def lib(compiled, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: compiled)
    return compiled


def relative(y, exact):
    return ((y.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


def relative_to_sums(y, exact, x, weight):
    """The error over what the outputs are large as, or would be if what is added up did not happen to cancel: a weight
    that is rounded on the way is off by its own size, not by the output's."""
    sums = (x.double().square() @ weight.double().square().t()).sum().sqrt()
    return ((y.double() - exact.double()).norm() / torch.maximum(exact.double().norm(), sums)).item()


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def random_scale(*shape):
    return (torch.rand(shape) + 0.1) / 100  # outputs that float16 can hold


def with_outliers(m, k, dtype):
    x = torch.randn(m, k)
    x[:, torch.randint(0, k, (max(1, k // 50),))] *= 30
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(33, 77), (70, 1100), (5, 64), (1, 1), (130, 2300)])
def test_w8_is_exact(lib, n, k, dtype):
    qweight, scale, bias = random_int8(n, k), random_scale(n), torch.randn(n).to(dtype)
    op = ops.w8a32_linear if dtype is torch.float32 else ops.w8a16_linear
    for m in (*TOKENS, 33, 600, 1100):  # 1100: more than one panel of tokens
        x = with_outliers(m, k, dtype)
        exact = x.double() @ (qweight.double() * scale.double()[:, None]).t() + bias.double()
        assert relative(op(x, qweight, scale, bias), exact) < TOLERANCE[dtype]
        assert relative(op(x, qweight, scale, None), exact - bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("zero_point", [False, True])
def test_w8a8_is_the_reference(lib, zero_point, static, dtype):
    for m in TOKENS:
        for n, k in [(33, 77), (70, 1100), (130, 2300)]:
            args = (
                with_outliers(m, k, dtype),
                random_int8(n, k),
                random_scale(n),
                random_int8(n) if zero_point else None,
                torch.tensor(0.05) if static else None,
                torch.tensor(-77, dtype=torch.int8) if static else None,
                torch.randn(n).to(dtype),
            )
            assert relative(ops.w8a8_linear(*args), reference.w8a8_linear(*args)) < TOLERANCE[dtype]
            for rotation in (0, 32, 64):
                padded = -(-k // rotation) * rotation if rotation else k
                more = (args[0], random_int8(n, padded), *args[2:], torch.rand(k) + 0.5, rotation)
                # A rotation adds up in another order, and a value on the other side of a rounding tie is off by one
                # step: by one part in 127 of its token, if that is the only one.
                allowed = TOLERANCE[dtype] + (1.5 / 127 if rotation else 0)
                assert relative(ops.w8a8_linear(*more), reference.w8a8_linear(*more)) < allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitnet_is_the_reference(lib, dtype):
    for m in TOKENS:
        for n, k in [(33, 77), (70, 1100), (3, 1)]:
            codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
            args = (with_outliers(m, k, dtype), pack_ternary(codes), random_scale(n), torch.randn(n))
            assert relative(ops.bitnet_linear(*args), reference.bitnet_linear(*args)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size, rotate", [(32, True), (64, False), (128, True), ("channel", False)])
@pytest.mark.parametrize("rank", [0, 5])
def test_w4a16_is_the_reference(lib, rank, group_size, rotate, dtype):
    for m in TOKENS:
        for n, k in [(33, 77), (70, 1100)]:
            size = -(-k // 32) * 32 if group_size == "channel" else group_size
            padded = -(-k // size) * size
            args = (
                with_outliers(m, k, dtype),
                torch.randint(0, 256, (n, padded // 2), dtype=torch.uint8),
                random_scale(n, padded // size).to(dtype),
                torch.randint(-8, 8, (n, padded // size), dtype=torch.int8) if n == 33 else None,
                torch.rand(k) + 0.5 if rank else None,
                torch.randn(k, rank).bfloat16() if rank else None,
                torch.randn(n, rank).half() if rank else None,
                torch.randn(n),
                size,
                rotate,
            )
            # A rotated activation may round to the neighbour of the reference's: its sums were in another order.
            y, wanted = ops.w4a16_linear(*args), reference.w4a16_linear(*args)
            weight = reference.w4a16_dequantize(k, *args[1:7], size, rotate)
            assert relative_to_sums(y, wanted, args[0], weight) < 2 * TOLERANCE[dtype]  # both are rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size, zero_point", [(32, True), (64, False), (96, True), (352, False)])
def test_w4a16_for_every_number_of_tokens(lib, dtype, group_size, zero_point):
    """Few tokens are multiplied in another way than many. K is odd, and rows may end in half a step of 64 features."""
    n, k, rank = 45, 331, 7
    groups = -(-k // group_size)
    x = with_outliers(256, 2 * k, dtype)[:, ::2]
    weight = (
        torch.randint(0, 256, (n, groups * group_size // 2), dtype=torch.uint8),
        random_scale(n, groups).to(dtype),
        torch.randint(-8, 8, (n, groups), dtype=torch.int8) if zero_point else None,
    )
    signed = (torch.rand(k) + 0.5) * torch.randn(k).sign()  # the signs of a rotation are part of it
    smooth, down, up = signed, torch.randn(k, rank).to(dtype), torch.randn(n, rank).to(dtype)
    bias, rotate = torch.randn(n).to(dtype), group_size in (32, 64)
    dense = reference.w4a16_dequantize(k, *weight, smooth, down, up, group_size, rotate).double()
    exact = x.double() @ dense.t() + bias.double()
    for m in (*range(1, 18), 31, 32, 33, 48, 64, 65, 256):
        y = ops.w4a16_linear(x[:m], *weight, smooth, down, up, bias, group_size, rotate)
        assert relative_to_sums(y, exact[:m], x[:m], dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [331, 448])
def test_w8_for_every_number_of_tokens(lib, k, dtype):
    """Few tokens are multiplied in another way than many, and rows may end anywhere in a step of 64 features."""
    n = 61
    qweight, scale, bias = random_int8(n, k), random_scale(n), torch.randn(n).to(dtype)
    x = with_outliers(65, 2 * k, dtype)[:, ::2]
    op = ops.w8a32_linear if dtype is torch.float32 else ops.w8a16_linear
    exact = x.double() @ (qweight.double() * scale.double()[:, None]).t() + bias.double()
    for m in (*range(1, 34), 47, 48, 49, 64, 65):
        assert relative(op(x[:m], qweight, scale, bias), exact[:m]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 96, 352])
def test_w8_group_for_every_number_of_tokens(lib, group_size, zero_point, dtype):
    n, k = 61, 331
    groups = -(-k // group_size)
    qweight, scale, bias = random_int8(n, k), random_scale(n, groups), torch.randn(n).to(dtype)
    zero = random_int8(n, groups) if zero_point else None
    x = with_outliers(65, 2 * k, dtype)[:, ::2]
    weight = reference.w8_group_dequantize(qweight, scale, zero, group_size).double()
    exact = x.double() @ weight.t() + bias.double()
    for m in (*range(1, 34), 47, 48, 49, 64, 65):
        y = ops.w8_group_linear(x[:m], qweight, scale, zero, bias, group_size)
        assert relative_to_sums(y, exact[:m], x[:m], weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("n, k", [(9, 1), (2, 31), (3, 64), (5, 65), (70, 2300)])
def test_int8_weights_of_odd_shapes_times_few_tokens(lib, n, k):
    qweight, scale, size = random_int8(n, k), random_scale(n, 1).repeat(1, -(-k // 32)), 32
    for m in (1, 6, 13, 29):
        x = torch.randn(m, k).bfloat16()
        weight = reference.w8_group_dequantize(qweight, scale, None, size).double()
        for y in (
            ops.w8a16_linear(x, qweight, scale[:, 0].contiguous(), None),
            ops.w8_group_linear(x, qweight, scale, None, None, size),
        ):
            # Of so few outputs each may be off by half a step, and so may its weight.
            assert relative_to_sums(y, x.double() @ weight.t(), x, weight) < 2 * TOLERANCE[x.dtype]


def at_the_end_of_memory(dtype, *shape):
    """A tensor of random bytes with a page behind it that may not be read: reading on is a crash."""
    page = mmap.PAGESIZE
    held = torch.frombuffer(mmap.mmap(-1, 16 * page), dtype=torch.uint8)
    assert LIBC.mprotect(ctypes.c_void_p(held.data_ptr() + 15 * page), page, 0) == 0
    tensor = held[: 15 * page].view(dtype)[-math.prod(shape) :].view(shape)
    return tensor.copy_(torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype))


def test_int4_weights_end_where_they_end(lib):
    n, k = 43, 96
    weight = at_the_end_of_memory(torch.uint8, n, k // 2), random_scale(n, 3), None
    exact = reference.w4a16_dequantize(k, *weight, None, None, None, 32, False).double()
    for m in (1, 5, 40):
        x = torch.randn(m, k).bfloat16()
        y = ops.w4a16_linear(x, *weight, None, None, None, None, 32, False)
        assert relative_to_sums(y, x.double() @ exact.t(), x, exact) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("k", [1, 33, 97, 130])
def test_int8_weights_end_where_they_end(lib, k):
    n = 43
    qweight, scale = at_the_end_of_memory(torch.int8, n, k), random_scale(n, -(-k // 32))
    one = scale[:, 0].contiguous()
    for m in (1, 8, 16, 40):
        x = torch.randn(m, k).bfloat16()
        for y, weight in (
            (ops.w8a16_linear(x, qweight, one, None), qweight.double() * one[:, None]),
            (
                ops.w8_group_linear(x, qweight, scale, None, None, 32),
                reference.w8_group_dequantize(qweight, scale, None, 32).double(),
            ),
        ):
            assert relative_to_sums(y, x.double() @ weight.t(), x, weight) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("k", [1, 31, 33, 97, 130])
def test_integer_weights_end_where_they_end(lib, k):
    n, size = 43, 16
    codes, scale = at_the_end_of_memory(torch.int8, n, k), random_scale(n)
    groups = -(-k // size)
    nibbles, group_scale = at_the_end_of_memory(torch.uint8, n, groups * size // 2), random_group_scale(n, groups)
    at_end = at_the_end_of_memory(torch.uint8, n, groups).copy_(group_scale)
    for m in (1, 2, 5, 40):
        x = torch.randn(m, k)
        args = (x, codes, scale, None, None, None, None)
        assert relative(ops.w8a8_linear(*args), reference.w8a8_linear(*args)) < TOLERANCE[x.dtype]
        args = (x, nibbles, scale, at_end, None, None, None, None, size, False, 8, False)
        assert relative(ops.svdq_linear(*args), reference.svdq_linear(*args)) < TOLERANCE[x.dtype]


# act_bits, act_zero_point
ACTIVATIONS = [(4, False), (4, True), (8, False)]


def svdq_args(m, n, k, group_size, rank, act_bits, dtype=torch.float32, rotate=True, act_zero_point=False):
    padded = -(-k // group_size) * group_size
    return (
        with_outliers(m, k, dtype),
        torch.randint(0, 256, (n, padded // 2), dtype=torch.uint8),
        random_scale(n),
        random_group_scale(n, padded // group_size),
        torch.rand(k) + 0.5,
        torch.randn(k, rank).to(torch.bfloat16) if rank else None,
        torch.randn(n, rank).to(torch.float16) if rank else None,
        torch.randn(n).to(dtype),
        group_size,
        rotate,
        act_bits,
        act_zero_point,
    )


@pytest.mark.parametrize("act_bits, act_zero_point", ACTIVATIONS)
@pytest.mark.parametrize("group_size, rank", [(16, 3), (32, 0), (64, 32), (128, 40), (256, 1)])
def test_svdq_is_the_reference(lib, group_size, rank, act_bits, act_zero_point):
    for m in TOKENS:
        for n, k in [(33, 77), (70, 1100)]:
            args = svdq_args(m, n, k, group_size, rank, act_bits, rotate=False, act_zero_point=act_zero_point)
            assert relative(ops.svdq_linear(*args), reference.svdq_linear(*args)) < TOLERANCE[torch.float32]
            # Rotated, sums in another order put an activation on the other side of a rounding now and then: the
            # product is that of its own codes.
            x, qweight, scale, group_scale, smooth_factor, down, up, bias, *_ = args
            padded = 2 * qweight.shape[1]
            activations = (True, act_bits, act_zero_point)
            codes = ops.svdq_quantize(x, smooth_factor, down, padded, group_size, True, *activations)
            exact = reference.svdq_gemm(*codes, qweight, scale, group_scale, up, bias, group_size, torch.float64)
            assert relative(ops.svdq_linear(*args[:-3], *activations), exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_svdq_with_float_scales_is_the_reference(lib, group_size, act_bits):
    for m in TOKENS:
        args = list(svdq_args(m, 33, 300, group_size, 6, act_bits, rotate=False))
        args[2:4] = random_scale(33, args[3].shape[1]), None
        assert relative(ops.svdq_linear(*args), reference.svdq_linear(*args)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_svdq_takes_and_gives_every_float(lib, dtype):
    args = svdq_args(9, 40, 200, 64, 8, 8, dtype)
    y = ops.svdq_linear(*args)
    assert y.dtype is dtype and relative(y, reference.svdq_linear(*args)) < max(2e-3, TOLERANCE[dtype])


@pytest.mark.parametrize("act_bits, act_zero_point", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_codes_are_those_of_the_reference(lib, group_size, act_bits, act_zero_point):
    x, smooth, down = with_outliers(20, 500, torch.float32), torch.rand(500) + 0.5, torch.randn(500, 37).bfloat16()
    for rotate in (False, True):
        args = (x, smooth, down, -(-500 // group_size) * group_size, group_size, rotate, True, act_bits, act_zero_point)
        codes, scale, lora = ops.svdq_quantize(*args)
        wanted, wanted_scale, wanted_lora = reference.svdq_quantize(*args)
        different = (codes != wanted).float().mean().item()
        assert different == 0 if not rotate else different < (5e-3 if act_zero_point else 1e-3)
        torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
        assert relative(lora, wanted_lora) < 1e-6


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("m", TOKENS)
def test_the_largest_products_do_not_saturate(lib, m, sign):
    """Every product as large as it can be, of one sign: `vpmaddubsw` would stop at 32767."""
    k, n = 1024, 20
    x = torch.full((m, k), 3.0) * sign
    y = ops.w8a8_linear(x, torch.full((n, k), -128, dtype=torch.int8), torch.ones(n), None, None, None, None)
    torch.testing.assert_close(y, torch.full((m, n), -384.0 * k) * sign, rtol=1e-6, atol=0)
    qweight = pack_int4(torch.full((n, k), -8, dtype=torch.int8))
    for bits, zero_point in ACTIVATIONS:
        y = ops.svdq_linear(
            x, qweight, torch.ones(n), torch.full((n, k // 64), LARGEST, dtype=torch.uint8), None, None, None, None, 64,
            False, bits, zero_point,
        )  # fmt: skip
        largest = 3.0 * 7 / 7.5 if bits == 4 and not zero_point else 3.0  # of an activation, once it is rounded
        torch.testing.assert_close(y, torch.full((m, n), -128.0 * largest * k) * sign, rtol=1e-6, atol=0)


def all_ops(m, n=70, k=640):
    x, qweight, scale = torch.randn(m, k), random_int8(n, k), random_scale(n)
    packed, group_scale = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), random_scale(n, k // 64)
    half, none = x.bfloat16(), (None,) * 4
    svdq = svdq_args(m, n, k, 64, 32, 4)
    return {
        "w8a32": lambda: ops.w8a32_linear(x, qweight, scale, None),
        "w8a16": lambda: ops.w8a16_linear(half, qweight, scale, None),
        "w8a8": lambda: ops.w8a8_linear(x, qweight, scale, *none),
        "w8_group": lambda: ops.w8_group_linear(half, qweight, group_scale, None, None, 64),
        "w4a16": lambda: ops.w4a16_linear(half, packed, group_scale, None, *none, 64, True),
        "svdq": lambda: ops.svdq_linear(*svdq),
    }


@pytest.mark.parametrize("m", [1, 5, 13, 27, 40, 600])
def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads(lib, m):
    before = torch.get_num_threads()
    for name, run in all_ops(m).items():
        first = run()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(run(), first), name
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a16", "svdq"])
def test_the_memory_of_a_call_is_kept_for_the_next(lib, name):
    """Pages mapped anew at each call would take longer than a short product."""
    run = all_ops(600, n=8, k=4096)[name]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(), run()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            run()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    finally:
        torch.set_num_threads(before)
    codes = 600 * 4096  # bytes, at the least
    assert faults < codes / mmap.PAGESIZE


def test_a_call_larger_than_what_is_kept(lib):
    qweight, scale = random_int8(3, 4096), random_scale(3)
    some = torch.randn(60, 4096)
    exact = some.double() @ (qweight.double() * scale.double()[:, None]).t()
    for times in (70, 1, 70):  # 70: 69 MB
        y = ops.w8a32_linear(some.repeat(times, 1), qweight, scale, None)
        assert relative(y, exact.repeat(times, 1)) < 1e-6


def test_several_threads_of_python_at_once(lib):
    runs = [run for m in (1, 30) for run in all_ops(m).values()]
    wanted = [run() for run in runs]
    wrong = []

    def work():
        for _ in range(5):
            wrong.extend(i for i, run in enumerate(runs) if not torch.equal(run(), wanted[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_and_activations_that_begin_anywhere(lib):
    """Tensors mapped from a file, and views, are aligned to nothing."""
    n, k = 40, 200
    held = random_int8(n * k + 7)
    qweight = held[7:].view(n, k)
    x = torch.randn(6 * k + 1)[1:].view(6, k)
    scale = torch.rand(n + 1)[1:]
    y = ops.w8a32_linear(x, qweight, scale, None)
    assert relative(y, (x.double() @ qweight.double().t()) * scale) < 1e-6
    packed = torch.randint(0, 256, (n * 128 + 3,), dtype=torch.uint8)[3:].view(n, 128)
    args = svdq_args(6, n, 256, 64, 0, 8)
    args = (args[0], packed, *args[2:])
    assert relative(ops.svdq_linear(*args), reference.svdq_linear(*args)) < 2e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_spoiled_token_is_seen_and_spoils_no_other(lib, act_bits, bad):
    args = svdq_args(20, 33, 300, 64, 4, act_bits)
    clean = ops.svdq_linear(*args)
    args[0][7, 123] = bad
    y = ops.svdq_linear(*args)
    others = torch.arange(20) != 7
    assert not torch.isfinite(y[7]).any() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("static", [False, True])
def test_w8a8_does_not_round_nan_away(lib, static):
    x, given = torch.randn(6, 100), (torch.tensor(0.02), torch.tensor(3, dtype=torch.int8)) if static else (None, None)
    x[2, 50] = float("nan")
    y = ops.w8a8_linear(x, random_int8(20, 100), random_scale(20), None, *given, None)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("change, message", [
    ((1, torch.zeros(33, 7, dtype=torch.int8)), "qweight must have shape"),
    ((2, torch.ones(32)), "scale must have shape"),
    ((2, torch.ones(33).half()), "scale must be float32"),
    ((3, torch.ones(3)), "bias must have shape"),
])  # fmt: skip
def test_operands_that_would_be_read_past_their_end_are_refused(lib, change, message):
    args = [torch.randn(4, 20), random_int8(33, 20), torch.rand(33), torch.randn(33)]
    args[change[0]] = change[1]
    with pytest.raises((ValueError, TypeError), match=message):
        ops.w8a32_linear(*args)


# ---- where there are none -------------------------------------------------------------------------------------------


def run_python(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


CALL = """
import torch, qgraft, warnings
layer = qgraft.SVDQW4A4Linear.from_linear(torch.nn.Linear(128, 64), rank=4)
a, b = layer(torch.randn(3, 128)), layer(torch.randn(3, 128))
print(a.isfinite().all().item())
"""


def test_without_a_compiler_one_warning_says_so_and_the_result_is_right(tmp_path):
    done = run_python(CALL, PATH="/nowhere", QGRAFT_CACHE=str(tmp_path))
    assert done.stdout.strip() == "True", done.stderr
    assert done.stderr.count("no native CPU kernels") == 1 and "no C++ compiler" in done.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: I am broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run_python(CALL, CXX=str(compiler), QGRAFT_CACHE=str(tmp_path / "cache"))
    assert done.stdout.strip() == "True" and "I am broken" in done.stderr
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_is_told_for_what(tmp_path, monkeypatch, capsys, terminal):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("QGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(native.Unavailable):
        native.build()
    assert ("compiling the CPU kernels, once" in capsys.readouterr().err) == terminal


def test_it_can_be_switched_off_without_a_word(tmp_path):
    done = run_python(CALL, QGRAFT_NATIVE="0", QGRAFT_CACHE=str(tmp_path))
    assert done.stdout.strip() == "True" and not done.stderr and not list(tmp_path.iterdir())


def test_compiled_once_for_a_source_and_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("QGRAFT_CACHE", str(tmp_path))
    try:
        first = native.build()
    except native.Unavailable as why:
        pytest.skip(str(why))
    made = first.stat().st_mtime_ns
    assert native.build() == first and first.stat().st_mtime_ns == made and len(list(tmp_path.iterdir())) == 1
    assert native.build(("-DQG_OTHER",)) != first


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QGRAFT_CACHE", str(tmp_path / "file" / "cache"))
    assert os.access(native._cache(), os.W_OK)


def test_torch_and_no_other_package_gives_its_openmp(monkeypatch):
    wanted = native._openmp()
    if not wanted:
        pytest.skip("torch has no OpenMP library of its own")
    text = Path("/proc/self/maps").read_text()
    foreign = "7f00-7f01 r-xp 0 0:0 0  /a/site-packages/sentencepiece.libs/libgomp-6a29c32d.so.1.0.0\n"
    real = Path.read_text

    def read(self, *args, **options):
        return foreign + text if str(self) == "/proc/self/maps" else real(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert native._openmp() == wanted and "sentencepiece" not in wanted[0]


def test_other_systems_are_told_why(monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "arm64")
    with pytest.raises(native.Unavailable, match="x86-64"):
        native.build()


def test_the_sources_travel_with_the_package():
    assert {path.suffix for path in Path(native.SOURCES).iterdir()} == {".h", ".cpp"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.library()


def test_it_is_compiled_by_a_command_that_says_where_it_is_or_why_not(tmp_path):
    command = [sys.executable, "-m", "qgraft.kernels.cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": "/nowhere"})
    assert done.returncode == 1 and done.stderr.startswith("no native CPU kernels, because ") and not done.stdout
    try:
        path = native.build()
    except native.Unavailable:
        return
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(path), "")
