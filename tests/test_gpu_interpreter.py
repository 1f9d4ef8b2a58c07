"""The GPU kernels, every line of them, on the CPU: Triton's interpreter against the reference and float64.

The interpreter has to be chosen before a kernel is defined, so the kernels run in a second process: this very file,
as a script. It knows no bfloat16 (products of it come out as noise), so types here are float32, float16 and int8.
What the compiler makes of the kernels is the business of test_gpu_compile.py, what a GPU does of test_gpu_device.py.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback

import numpy
import pytest
import torch

if __name__ != "__main__":
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton's interpreter fails on every loop with numpy >= 2.4", allow_module_level=True)

TOKENS = [1, 2, 16, 17, 65]
SHAPES = [(37, 77), (70, 130), (128, 256)]  # (N, K)
GROUPS = [16, 32, 64, 128, 256]


GPU = "qgraft.kernels.gpu"


# ---- the second process ---------------------------------------------------------------------------------------------


class Kernels:
    """kernels("w8a16.w8a16_linear", *args) calls that function of qgraft.kernels.gpu under the interpreter."""

    def __init__(self):
        env = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )

    def __call__(self, name: str, *args):
        pickle.dump((name, args), self.process.stdin)
        self.process.stdin.flush()
        result, error = pickle.load(self.process.stdout)
        if error is not None:
            raise error
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def serve(requests, replies) -> None:
    while True:
        try:
            name, args = pickle.load(requests)
        except EOFError:
            return
        module, function = name.split(".")
        try:
            module = sys.modules["__main__"] if module == "here" else importlib.import_module(f"{GPU}.{module}")
            reply = getattr(module, function)(*args), None
        except (TypeError, ValueError) as error:
            reply = None, error
        except Exception:
            reply = None, RuntimeError(traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    import triton
    import triton.language as tl

    from qgraft.kernels.gpu import nvfp4
    from qgraft.kernels.gpu.common import bfloat16_terms

    @triton.jit
    def terms_kernel(x_ptr, terms_ptr, N: tl.constexpr):
        offs = tl.arange(0, N)
        high, mid, low = bfloat16_terms(tl.load(x_ptr + offs))
        tl.store(terms_ptr + offs, high)
        tl.store(terms_ptr + N + offs, mid)
        tl.store(terms_ptr + 2 * N + offs, low)

    def terms(x):
        result = x.new_empty(3, len(x))
        terms_kernel[(1,)](x, result, len(x))
        return result

    # pickle cannot take 8-bit floats back out, so they travel as bytes.
    def nvfp4_quantize(x):
        codes, scale, row_scale = nvfp4.quantize(x)
        return codes, scale.view(torch.uint8), row_scale

    def nvfp4_linear(x, qweight, scale, row_scale, bias):
        return nvfp4.nvfp4_linear(x, qweight, scale.view(torch.float8_e4m3fn), row_scale, bias)

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not mix with the answers
    serve(sys.stdin.buffer, answers)
    sys.exit()

from group_scales import LARGEST, random_group_scale  # noqa: E402

from qgraft.kernels import nvfp4, reference  # noqa: E402
from qgraft.kernels.packing import pack_int4, pack_ternary  # noqa: E402


@pytest.fixture(scope="module")
def kernels():
    worker = Kernels()
    yield worker
    worker.close()


# ---- W8A16 and W8A32 ------------------------------------------------------------------------------------------------


BIASES = [None, torch.float32, torch.float16]
# Every number of tokens with every shape, and each bias with every shape.
W8_CASES = [(m, n, k, BIASES[(i + j) % 3]) for i, m in enumerate(TOKENS) for j, (n, k) in enumerate(SHAPES)]


def w8_problem(m, n, k, dtype, bias_dtype=None):
    x = torch.randn(m, k).to(dtype)
    qweight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n) / 100 + 1e-3
    return x, qweight, scale, None if bias_dtype is None else torch.randn(n).to(bias_dtype)


def w8_truth(x, qweight, scale, bias):
    y = (x.double() @ qweight.double().t()) * scale.double()
    return y if bias is None else y + bias.double()


def relative(y, truth) -> float:
    return ((y.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("m, n, k, bias_dtype", W8_CASES)
def test_w8a16_is_right_to_the_rounding_of_its_output(kernels, m, n, k, bias_dtype):
    problem = w8_problem(m, n, k, torch.float16, bias_dtype)
    y = kernels("w8a16.w8a16_linear", *problem)
    assert y.dtype == torch.float16 and y.shape == (m, n)
    truth = w8_truth(*problem)
    # Half a unit in the last place of a float16, and float32 sums next to it.
    assert (y.double() - truth).abs().le(2**-11 * truth.abs() + 1e-5).all()


@pytest.mark.parametrize("m, n, k, bias_dtype", W8_CASES)
def test_w8a32_has_the_accuracy_of_float32(kernels, m, n, k, bias_dtype):
    problem = w8_problem(m, n, k, torch.float32, bias_dtype)
    y = kernels("w8a32.w8a32_linear", *problem)
    assert y.dtype == torch.float32 and y.shape == (m, n)
    assert relative(y, w8_truth(*problem)) < 4e-7  # one TF32 product would be at 2e-4, one bfloat16 at 2e-3


def test_w8a16_sums_beyond_the_range_of_float16(kernels):
    x = torch.full((2, 256), 60000.0, dtype=torch.float16)
    qweight = torch.full((3, 256), 127, dtype=torch.int8)  # the raw sum is 2e9
    y = kernels("w8a16.w8a16_linear", x, qweight, torch.full((3,), 1e-6), None)
    assert torch.allclose(y.float(), torch.tensor(60000.0 * 127 * 256 * 1e-6), rtol=1e-3)


def test_the_three_terms_of_a_float32_are_bfloat16_and_add_up_to_it_exactly(kernels):
    # (In the interpreter the kernels multiply the terms as float32: nothing else would notice one that is too long.)
    powers = torch.logspace(-25, 37, 1024)  # below, the last term falls under the smallest bfloat16
    x = torch.randn(1024) * powers
    x = torch.where(x.isfinite(), x, 0.0)
    high, mid, low = terms = kernels("here.terms", x)
    assert terms.view(torch.int32).bitwise_and(0xFFFF).eq(0).all()
    assert torch.equal(low + mid + high, x)
    one = torch.ones(1, 1, dtype=torch.int8)
    assert torch.equal(kernels("w8a32.w8a32_linear", x[:, None], one, torch.ones(1), None)[:, 0], x)


def test_w8a32_keeps_infinity_and_nan_where_they_are(kernels):
    x = torch.randn(3, 40)
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    # A NaN whose payload is in the low half only: cut off there, it would turn into infinity.
    x[2, 7] = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)[0]
    qweight = torch.randint(1, 128, (8, 40), dtype=torch.int8)
    y = kernels("w8a32.w8a32_linear", x, qweight, torch.ones(8), None)
    assert y[0].eq(float("inf")).all() and y[1].isnan().all() and y[2].isnan().all()


def test_w8a32_takes_denormals(kernels):
    x = torch.full((1, 64), 1e-40)
    y = kernels("w8a32.w8a32_linear", x, torch.full((1, 64), 100, dtype=torch.int8), torch.ones(1), None)
    assert abs(y.item() - x.double().sum().item() * 100) < 1e-40 * 64


@pytest.mark.parametrize("op, dtype", [("w8a16.w8a16_linear", torch.float16), ("w8a32.w8a32_linear", torch.float32)])
def test_w8_empty_and_strided_inputs(kernels, op, dtype):
    x, qweight, scale, bias = w8_problem(6, 9, 40, dtype, dtype)
    assert kernels(op, x[:0], qweight, scale, bias).shape == (0, 9)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(kernels(op, strided, qweight, scale, bias), kernels(op, x, qweight, scale, bias))
    assert torch.equal(kernels(op, x[::2], qweight, scale, bias), kernels(op, x, qweight, scale, bias)[::2])


@pytest.mark.parametrize(
    "op, right, wrong", [("w8a16", torch.float16, torch.float32), ("w8a32", torch.float32, torch.float16)]
)
def test_w8_says_which_argument_is_wrong(kernels, op, right, wrong):
    x, qweight, scale, bias = w8_problem(2, 9, 40, right, right)
    name = f"{op}.{op}_linear"
    with pytest.raises(TypeError, match=f"{op}_linear: x must be .*{str(right)[6:]}"):
        kernels(name, x.to(wrong), qweight, scale, bias)
    with pytest.raises(TypeError, match="qweight must be int8, got uint8"):
        kernels(name, x, qweight.view(torch.uint8), scale, bias)
    with pytest.raises(TypeError, match="scale must be float32"):
        kernels(name, x, qweight, scale.half(), bias)
    with pytest.raises(ValueError, match=r"qweight must have shape \(9, 39\), got \(9, 40\)"):
        kernels(name, x[:, :39], qweight, scale, bias)
    with pytest.raises(ValueError, match="bias must have shape"):
        kernels(name, x, qweight, scale, bias[:3])


# ---- SVDQ, activations ----------------------------------------------------------------------------------------------

# two_level, act_bits, act_zero_point
MODES = {"two_level": (True, 4, False), "zero_point": (True, 4, True), "group": (False, 4, False),
         "int8": (False, 8, False)}  # fmt: skip


def smooth_factors(k):
    """Of either sign: those of features before a rotation are part of them."""
    return (torch.rand(k) + 0.5) * torch.randn(k).sign()


def quantizer_problem(m, k, group_size, rank=5, dtype=torch.float32, down_dtype=None, smooth=True):
    x = (torch.randn(m, k) * torch.rand(k).mul(3).exp()).to(dtype)
    smooth_factor = smooth_factors(k) if smooth else None
    proj_down = torch.randn(k, rank).to(down_dtype or dtype) if rank else None
    return x, smooth_factor, proj_down, -(-k // group_size) * group_size, group_size


def assert_same_codes(got, wanted, largest_step):
    """Equal, but for numbers so close to the middle of two codes that the order of a sum decides."""
    (codes, scale, lora_act), (ref_codes, ref_scale, ref_lora) = got, wanted
    assert codes.dtype == torch.int8 and codes.shape == ref_codes.shape
    assert scale.shape == ref_scale.shape and lora_act.shape == ref_lora.shape
    off = (codes.int() - ref_codes.int()).abs()
    assert off.max() <= largest_step and off.ne(0).sum() <= max(2, 2e-3 * off.numel())  # of ties, where sums differ
    assert torch.allclose(scale, ref_scale, rtol=2e-6, atol=0)
    if lora_act.numel():
        assert relative(lora_act, ref_lora) < 4e-6  # two sums in float32


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", GROUPS)
def test_codes_equal_the_reference(kernels, group_size, mode, rotate):
    dtype = torch.float16 if group_size in (32, 128) else torch.float32
    problem = quantizer_problem(2, 77 if rotate else 300, group_size, dtype=dtype, smooth=mode != "group")
    args = (*problem, rotate, *MODES[mode])
    got, wanted = kernels("svdq.svdq_quantize", *args), reference.svdq_quantize(*args)
    assert_same_codes(got, wanted, largest_step=16 if MODES[mode][0] else 1)


@pytest.mark.parametrize("m", TOKENS)
def test_codes_for_any_number_of_tokens(kernels, m):
    args = (*quantizer_problem(m, 130, 64, rank=32, dtype=torch.float16), True, True, 4)
    assert_same_codes(kernels("svdq.svdq_quantize", *args), reference.svdq_quantize(*args), largest_step=16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [3000, 4200])  # a row of one tile of 4096 features, and a row of two
def test_codes_of_long_rows(kernels, k, mode):
    args = (*quantizer_problem(2, k, 64), True, *MODES[mode])
    got, wanted = kernels("svdq.svdq_quantize", *args), reference.svdq_quantize(*args)
    assert_same_codes(got, wanted, largest_step=16 if MODES[mode][0] else 1)


def test_codes_in_planes_are_the_codes_in_another_order(kernels):
    args = (*quantizer_problem(3, 100, 16), True, True, 4, True)
    planes, *_ = kernels("svdq_quantize.quantize", *args, True)
    codes, *_ = kernels("svdq_quantize.quantize", *args, False)
    assert torch.equal(planes, torch.cat([codes[:, 0::2], codes[:, 1::2]], dim=1))


def test_codes_are_rounded_half_to_even_and_clipped_alike_on_both_sides(kernels):
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, -0.5, -1.5, -2.5, -3.5, -4.5, -5.5, -6.5, -7.0]])
    codes, scale, _ = kernels("svdq.svdq_quantize", x, None, None, 16, 16, False, False, 4)
    assert scale.item() == 1
    assert codes[0].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 0, -2, -2, -4, -4, -6, -6, -7]


def test_a_token_of_zeros_has_zero_codes_and_one_of_nan_a_nan_scale(kernels):
    x = torch.randn(3, 64)
    x[0], x[1, 9] = 0, float("nan")
    for mode in MODES.values():
        codes, scale, _ = kernels("svdq.svdq_quantize", x, None, None, 64, 64, True, *mode)
        assert codes[0].eq(0).all() and scale[0].isfinite().all()
        assert scale[1].isnan().all() and scale[2].isfinite().all()


@pytest.mark.parametrize("down_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [1, 32, 70])
def test_the_branch_comes_down_in_float32(kernels, rank, dtype, down_dtype):
    x, smooth_factor, proj_down, *rest = quantizer_problem(3, 300, 64, rank, dtype, down_dtype)
    _, _, lora_act = kernels("svdq.svdq_quantize", x, smooth_factor, proj_down, *rest, True, True, 4)
    if dtype == torch.float16:  # the product is taken in the 16 bits of x
        proj_down = proj_down.half()
    assert lora_act.dtype == torch.float32
    x, proj_down = x.double(), proj_down.double()
    sums = (x.square() @ proj_down.square()).sum().sqrt()  # what is added up; three outputs of it may cancel
    assert (lora_act - x @ proj_down).norm() / sums < 1e-6


# ---- SVDQ, the layer ------------------------------------------------------------------------------------------------


def svdq_problem(m, n, k, group_size, two_level, rank=5, dtype=torch.float32, bias_dtype=None, smooth=True):
    x, smooth_factor, proj_down, padded, _ = quantizer_problem(m, k, group_size, rank, dtype, smooth=smooth)
    groups = padded // group_size
    qweight = pack_int4(torch.randint(-8, 8, (n, padded), dtype=torch.int8))
    scale = torch.rand(n) / 1000 if two_level else torch.rand(n, groups) / 100
    group_scale = random_group_scale(n, groups) if two_level else None
    proj_up = torch.randn(n, rank).to(dtype) if rank else None
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    return x, qweight, scale, group_scale, smooth_factor, proj_down, proj_up, bias, group_size


def assert_svdq(kernels, problem, rotate, act_bits, act_zero_point=False):
    """The product is right for the codes that were made (they have their own tests), and the layer as a whole near."""
    x, qweight, scale, group_scale, smooth_factor, proj_down, proj_up, bias, group_size = problem
    y = kernels("svdq.svdq_linear", *problem, rotate, act_bits, act_zero_point)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], qweight.shape[0])
    quantizer_args = (2 * qweight.shape[1], group_size, rotate, group_scale is not None, act_bits, act_zero_point)
    made = kernels("svdq.svdq_quantize", x, smooth_factor, proj_down, *quantizer_args)
    truth = reference.svdq_gemm(*made, qweight, scale, group_scale, proj_up, bias, group_size, torch.float64)
    assert relative(y, truth) < (3e-4 if x.dtype == torch.float16 else 5e-7)
    assert relative(y, reference.svdq_linear(*problem, rotate, act_bits, act_zero_point)) < 2e-2


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_svdq_for_every_group_size_and_kind_of_scale(kernels, group_size, two_level, act_bits):
    dtype = torch.float16 if group_size in (16, 128) else torch.float32
    problem = svdq_problem(2 if act_bits == 8 else 17, 37, 77, group_size, two_level, dtype=dtype, bias_dtype=dtype)
    assert_svdq(kernels, problem, True, act_bits)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("two_level", [True, False])
def test_svdq_for_any_number_of_tokens(kernels, m, two_level):
    problem = svdq_problem(m, 70, 130, 64, two_level, 32, torch.float16, torch.float16)
    assert_svdq(kernels, problem, True, 4, act_zero_point=two_level)


@pytest.mark.parametrize(
    "m, group_size, two_level", [(65, 16, True), (17, 32, False), (17, 256, True), (17, 256, False)]
)
def test_svdq_over_several_tiles(kernels, m, group_size, two_level):
    assert_svdq(kernels, svdq_problem(m, 130, 520, group_size, two_level, 40), True, 4)


@pytest.mark.parametrize("rank", [0, 5, 32, 70])
@pytest.mark.parametrize("smooth, rotate", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_svdq_without_each_of_its_parts(kernels, rank, smooth, rotate, bias_dtype):
    assert_svdq(kernels, svdq_problem(2, 37, 77, 64, True, rank, torch.float32, bias_dtype, smooth), rotate, 4)


def test_svdq_takes_the_largest_sums(kernels):
    """Every product at its largest: 127 * 128 a feature, and folded weights at the very end of int8."""
    x = torch.ones(1, 512)
    qweight = pack_int4(torch.full((4, 512), -8, dtype=torch.int8))
    group_scale = torch.full((4, 8), LARGEST, dtype=torch.uint8)
    problem = (x, qweight, torch.ones(4), group_scale, None, None, None, None, 64)
    y = kernels("svdq.svdq_linear", *problem, False, 8)
    assert torch.allclose(y, torch.full((1, 4), -128.0 * 512), rtol=1e-6)


def test_svdq_empty_and_strided_inputs(kernels):
    problem = svdq_problem(6, 37, 77, 64, True)
    x, rest = problem[0], problem[1:]
    assert kernels("svdq.svdq_linear", x[:0], *rest, True, 4).shape == (0, 37)
    codes, scale, lora_act = kernels("svdq.svdq_quantize", x[:0], None, None, 128, 64, True, False, 4)
    assert (codes.shape, scale.shape, lora_act.shape) == ((0, 128), (0, 2), (0, 0))
    whole = kernels("svdq.svdq_linear", x, *rest, True, 4)
    assert torch.equal(kernels("svdq.svdq_linear", x[::2], *rest, True, 4), whole[::2])


def test_svdq_says_which_argument_is_wrong(kernels):
    x, qweight, scale, group_scale, smooth, down, up, bias, group = svdq_problem(2, 37, 77, 64, True)
    with pytest.raises(TypeError, match="svdq_quantize: x must be bfloat16 or float16 or float32, got float64"):
        kernels("svdq.svdq_linear", x.double(), qweight, scale, group_scale, smooth, down, up, bias, group, True, 4)
    with pytest.raises(TypeError, match="svdq_linear: qweight must be uint8, got int8"):
        kernels(
            "svdq.svdq_linear", x, qweight.view(torch.int8), scale, group_scale, smooth, down, up, bias, group, True, 4
        )
    with pytest.raises(ValueError, match="group_size must be 16, 32, 64, 128 or 256, got 48"):
        kernels("svdq.svdq_linear", x, qweight, scale, group_scale, smooth, down, up, bias, 48, True, 4)
    with pytest.raises(ValueError, match="act_bits must be 4 or 8, got 6"):
        kernels("svdq.svdq_linear", x, qweight, scale, group_scale, smooth, down, up, bias, group, True, 6)
    with pytest.raises(ValueError, match="act_zero_point is for activations of 4 bits with two-level scales"):
        kernels("svdq.svdq_linear", x, qweight, scale, group_scale, smooth, down, up, bias, group, True, 8, True)
    with pytest.raises(ValueError, match="proj_up must have shape"):
        kernels("svdq.svdq_linear", x, qweight, scale, group_scale, smooth, down, up[:, :3], bias, group, True, 4)


def test_svdq_refuses_sums_that_an_int32_cannot_hold(kernels):
    k = 132_160  # 127 * 128 each: just above 2^31
    qweight, group_scale = torch.zeros(1, k // 2, dtype=torch.uint8), torch.ones(1, k // 64, dtype=torch.uint8)
    problem = (torch.zeros(1, k), qweight, torch.ones(1), group_scale, None, None, None, None, 64)
    with pytest.raises(ValueError, match="132160 input features: an int32 holds the products of 132104 at most"):
        kernels("svdq.svdq_linear", *problem, False, 8)


# ---- W4A16 ----------------------------------------------------------------------------------------------------------


def w4a16_problem(m, n, k, group_size=64, zero_point=True, rank=0, smooth=False, rotate=False, bias=False):
    group_size = group_size or -(-k // 32) * 32  # 0: one scale a row
    groups = -(-k // group_size)
    qweight = pack_int4(torch.randint(-8, 8, (n, groups * group_size), dtype=torch.int8))
    scale = (torch.rand(n, groups) / 50 + 1e-2).half()
    zero_point = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if zero_point else None
    smooth_factor = smooth_factors(k) if smooth else None
    down, up = (torch.randn(s, rank).half() / 8 for s in (k, n)) if rank else (None, None)
    bias = torch.randn(n).half() if bias else None
    return torch.randn(m, k).half(), qweight, scale, zero_point, smooth_factor, down, up, bias, group_size, rotate


def assert_w4a16(kernels, problem):
    y = kernels("w4a16.w4a16_linear", *problem)
    assert y.dtype == torch.float16 and y.shape == (len(problem[0]), len(problem[1]))
    assert relative(y, reference.w4a16_linear(*problem)) < 1e-3  # a weight and the sum, rounded to float16 each
    assert torch.equal(y, kernels("w4a16.w4a16_linear", *problem))


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, 0])
def test_w4a16_for_every_group_size(kernels, group_size, zero_point):
    assert_w4a16(kernels, w4a16_problem(3, 37, 1111, group_size, zero_point))


@pytest.mark.parametrize("m", [*TOKENS, 8, 9])
@pytest.mark.parametrize("k", [77, 512])
def test_w4a16_for_any_number_of_tokens(kernels, m, k):
    assert_w4a16(kernels, w4a16_problem(m, 70, k, bias=True))


@pytest.mark.parametrize("m", [2, 17])
@pytest.mark.parametrize(
    "rank, smooth, rotate", [(0, True, True), (5, False, False), (32, True, True), (70, False, True)]
)
def test_w4a16_with_each_of_its_parts(kernels, m, rank, smooth, rotate):
    assert_w4a16(kernels, w4a16_problem(m, 37, 300, 64, True, rank, smooth, rotate, True))


def test_w4a16_takes_unaligned_and_strided_memory_and_says_what_it_does_not_take(kernels):
    x, qweight, *rest = w4a16_problem(4, 37, 128)
    whole = kernels("w4a16.w4a16_linear", x, qweight, *rest)
    memory = torch.zeros(qweight.numel() + 1, dtype=torch.uint8)
    moved = memory[1:].view_as(qweight).copy_(qweight)
    assert torch.equal(kernels("w4a16.w4a16_linear", x[::2], moved, *rest), whole[::2])
    assert kernels("w4a16.w4a16_linear", x[:0], qweight, *rest).shape == (0, 37)
    assert torch.equal(kernels("w4a16.w4a16_linear", x.float(), qweight, *rest),
                       reference.w4a16_linear(x.float(), qweight, *rest))  # fmt: skip
    with pytest.raises(TypeError, match="x must be bfloat16 or float16, got float64"):
        kernels("w4a16.w4a16_linear", x.double(), qweight, *rest)
    with pytest.raises(ValueError, match="group_size must be 16, 32, 64, 128 or 256, or the whole row"):
        kernels("w4a16.w4a16_linear", x, qweight, *rest[:-2], 48, False)


# ---- W8A8 -----------------------------------------------------------------------------------------------------------


def w8a8_problem(m, n, k, dtype=torch.float32, zero_point=True, static=True, act_zero=True, bias=True):
    x, qweight, scale, bias = w8_problem(m, n, k, dtype, dtype if bias else None)
    zero_point = torch.randint(-128, 128, (n,), dtype=torch.int8) if zero_point else None
    act_scale = torch.tensor(0.02) if static else None
    act_zero_point = torch.tensor(-37, dtype=torch.int8) if static and act_zero else None
    return x, qweight, scale, zero_point, act_scale, act_zero_point, bias


def assert_w8a8(kernels, problem):
    y, truth = kernels("w8a8.w8a8_linear", *problem), reference.w8a8_linear(*problem)
    assert y.dtype == problem[0].dtype
    assert relative(y, truth) < (1e-6 if y.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("static", [True, False])
def test_w8a8_for_any_number_of_tokens(kernels, static, m):
    assert_w8a8(kernels, w8a8_problem(m, 70, 77 if m % 2 else 2048, static=static))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("static, act_zero", [(True, True), (True, False), (False, False)])
def test_w8a8_with_each_kind_of_scale_and_zero_point(kernels, static, act_zero, zero_point, dtype):
    assert_w8a8(kernels, w8a8_problem(5, 37, 2000, dtype, zero_point, static, act_zero, bias=zero_point))


@pytest.mark.parametrize("static, zero_point", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("rotation, k", [(0, 77), (64, 77), (64, 2048), (128, 300)])
def test_w8a8_smooths_and_rotates_first(kernels, static, zero_point, rotation, k):
    padded = -(-k // rotation) * rotation if rotation else k
    x, _, *rest = w8a8_problem(5, 37, k, zero_point=zero_point, static=static)
    x[:, 3] *= 50  # an outlier, which is what the rotation is for
    qweight = torch.randint(-127, 128, (37, padded), dtype=torch.int8)
    problem = (x, qweight, *rest, torch.rand(k) + 0.5, rotation)
    y, truth = kernels("w8a8.w8a8_linear", *problem), reference.w8a8_linear(*problem)
    errors = (y - truth).norm(dim=1) / truth.norm(dim=1)
    # A rotation adds up in another order: now and then an activation is on the other side of a rounding, in a token.
    assert errors.median() < 1e-6 and errors.max() < (5e-3 if rotation else 1e-6), errors


def test_w8a8_takes_the_largest_sums_zeros_infinity_and_nan(kernels):
    k = 4096
    x = torch.full((3, k), 1e9)
    x[1] = 0
    qweight = torch.full((2, k), -128, dtype=torch.int8)
    zeros = torch.full((2,), 127, dtype=torch.int8)
    static = torch.tensor(1.0), torch.tensor(-128, dtype=torch.int8)
    y = kernels("w8a8.w8a8_linear", x, qweight, torch.ones(2), zeros, *static, None)
    assert y[0].tolist() == [-255.0 * 255 * k] * 2 and y[1].eq(0).all()
    x[2, 5], x[0, 3] = float("nan"), 1.0
    y = kernels("w8a8.w8a8_linear", x, qweight, torch.ones(2), None, None, None, None)
    assert y[0].isfinite().all() and y[1].eq(0).all() and y[2].isnan().all()
    y = kernels("w8a8.w8a8_linear", x, qweight, torch.ones(2), zeros, *static, None)
    assert y[:2].isfinite().all() and y[2].isnan().all()
    with pytest.raises(ValueError, match="65794 input features: an int32 holds the products of 65793 at most"):
        kernels("w8a8.w8a8_linear", torch.zeros(1, 65794), torch.zeros(1, 65794).to(torch.int8), torch.ones(1), None,
                *static, None)  # fmt: skip


# ---- BitNet ---------------------------------------------------------------------------------------------------------


def bitnet_problem(m, n, k, dtype=torch.float32, bias=True):
    x, _, scale, bias = w8_problem(m, n, k, dtype, dtype if bias else None)
    return x, pack_ternary(torch.randint(-1, 2, (n, k))), scale, bias


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("n, k", [*SHAPES, (70, 2050)])
def test_bitnet_for_any_number_of_tokens(kernels, m, n, k):
    dtype = torch.float16 if m % 2 else torch.float32
    problem = bitnet_problem(m, n, k, dtype, bias=m > 1)
    y = kernels("bitnet.bitnet_linear", *problem)
    assert y.dtype == dtype and y.shape == (m, n)
    assert relative(y, reference.bitnet_linear(*problem)) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert torch.equal(y, kernels("bitnet.bitnet_linear", *problem))


def test_bitnet_takes_the_largest_sums_zeros_nan_and_any_padding(kernels):
    k = 4099
    x, qweight = torch.full((3, k), 127.0), pack_ternary(torch.tensor([-1, 1])[:, None].expand(2, k))
    x[1], x[2, 5] = 0, float("nan")
    qweight[:, -1] |= 0b11000000  # the feature past the last one: nothing that stands there may count
    y = kernels("bitnet.bitnet_linear", x, qweight, torch.ones(2), None)
    assert y[0].tolist() == [-127.0 * k, 127.0 * k] and y[1].eq(0).all() and y[2].isnan().all()
    assert kernels("bitnet.bitnet_linear", x[:0], qweight, torch.ones(2), None).shape == (0, 2)
    assert torch.equal(kernels("bitnet.bitnet_linear", x[::2], qweight, torch.ones(2), None)[0], y[0])
    with pytest.raises(ValueError, match=r"bitnet_linear: qweight must have shape \(2, 1024\), got \(2, 1025\)"):
        kernels("bitnet.bitnet_linear", x[:, :4096], qweight, torch.ones(2), None)


# ---- NVFP4 ----------------------------------------------------------------------------------------------------------


def assert_same_nvfp4(kernels, x):
    (codes, scale, row_scale), wanted = kernels("here.nvfp4_quantize", x), nvfp4.nvfp4_quantize(x)
    assert torch.equal(row_scale, wanted[2]) and torch.equal(scale, wanted[1].view(torch.uint8))
    assert torch.equal(codes, wanted[0])


def nvfp4_weight(n, k):
    """As it is sent, and as it is."""
    codes, scale, row_scale = nvfp4.nvfp4_quantize(torch.randn(n, k))
    return (codes, scale.view(torch.uint8), row_scale), (codes, scale, row_scale)


def test_nvfp4_codes_and_scales_equal_the_reference(kernels):
    assert_same_nvfp4(kernels, (torch.randn(3, 2100) * torch.randn(3, 2100).mul(2).exp()).half())
    assert_same_nvfp4(kernels, torch.logspace(-6, 3, 1000)[None] * torch.tensor([[1.0], [-1.0], [0.0]]))
    assert_same_nvfp4(kernels, torch.arange(-24, 25)[None].div(4.0))  # with every tie


@pytest.mark.parametrize("m, n, k", [(1, 37, 77), (17, 70, 1030), (65, 130, 256), (0, 9, 40)])
def test_nvfp4_is_the_product_of_its_codes(kernels, m, n, k):
    """By the plain form of the product: the interpreter has no block-scaled one."""
    sent, weight = nvfp4_weight(n, k)
    x, bias = torch.randn(m, k), torch.randn(n)
    y = kernels("here.nvfp4_linear", x, *sent, bias)
    assert y.shape == (m, n) and relative(y, nvfp4.nvfp4_linear(x, *weight, bias)) < 1e-6


def test_nvfp4_keeps_nan_in_its_row_and_names_what_is_wrong(kernels):
    (codes, scale, row_scale), _ = nvfp4_weight(5, 64)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = kernels("here.nvfp4_linear", x, codes, scale, row_scale, None)
    assert y[1].isnan().all() and y[::2].isfinite().all()
    with pytest.raises(ValueError, match=r"nvfp4_linear: qweight must have shape \(5, 24\), got \(5, 32\)"):
        kernels("here.nvfp4_linear", x[:, :48], codes, scale, row_scale, None)
    with pytest.raises(TypeError, match="scale must be float8_e4m3fn, got float32"):
        kernels("nvfp4.nvfp4_linear", x, codes, scale.float(), row_scale, None)


# ---- many tokens ----------------------------------------------------------------------------------------------------


def test_many_tokens_are_multiplied_by_torch_with_dequantized_weights(kernels):
    problem = w8_problem(1024, 37, 2077, torch.float16, torch.float16)
    assert relative(kernels("w8a16.w8a16_linear", *problem), w8_truth(*problem)) < 1e-3
    for group_size, rank in ((64, 5), (0, 0)):
        problem = w4a16_problem(1024, 9, 333, group_size, True, rank, rank > 0, rank > 0, True)
        assert relative(kernels("w4a16.w4a16_linear", *problem), reference.w4a16_linear(*problem)) < 2e-3
