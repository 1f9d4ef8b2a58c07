"""The GPU kernels on a GPU: parity with the reference, and life among torch.compile, graphs, streams and autograd."""

import pytest
import torch
from group_scales import LARGEST, random_group_scale

from qgraft.kernels import nvfp4, ops, reference
from qgraft.kernels.packing import pack_int4, pack_ternary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
]

TOKENS = [1, 2, 16, 17, 65, 257, 1024]
SHAPES = [(37, 77), (301, 1000), (4096, 4096)]  # (N, K): odd, not a multiple of the tiles, and that of a model
GROUPS = [16, 32, 64, 128, 256]
MODES = {"two_level": (True, 4), "two_level_a8": (True, 8), "group": (False, 4), "group_a8": (False, 8)}
# Relative error of a result that is only rounded to its type at the end (of float32: that sums some thousand terms).
EPSILON = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 4e-6}


def relative(y, truth) -> float:
    return ((y.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def randn(*shape, dtype=torch.float32, device="cuda"):
    return torch.randn(*shape, device=device).to(dtype)


def w8_problem(m, n, k, dtype, bias_dtype=None, device="cuda"):
    qweight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    scale = torch.rand(n, device=device) / 100 + 1e-3
    bias = None if bias_dtype is None else randn(n, dtype=bias_dtype, device=device)
    return randn(m, k, dtype=dtype, device=device), qweight, scale, bias


def w8_truth(x, qweight, scale, bias):
    y = (x.double() @ qweight.double().t()) * scale.double()
    return y if bias is None else y + bias.double()


def svdq_problem(m, n, k, group_size, two_level, dtype, rank=32, smooth=True, device="cuda"):
    padded = -(-k // group_size) * group_size
    groups = padded // group_size
    codes = torch.randint(-8, 8, (n, padded), dtype=torch.int8, device=device)
    scale = torch.rand(n, device=device) / 1000 if two_level else torch.rand(n, groups, device=device) / 100
    group_scale = random_group_scale(n, groups, device) if two_level else None
    branch = torch.bfloat16 if dtype == torch.float32 else dtype
    proj_down = randn(k, rank, dtype=branch, device=device) / k**0.5 if rank else None
    proj_up = randn(n, rank, dtype=branch, device=device) if rank else None
    smooth_factor = torch.rand(k, device=device) + 0.5 if smooth else None
    bias = randn(n, dtype=dtype, device=device)
    x = randn(m, k, dtype=dtype, device=device)
    return x, pack_int4(codes), scale, group_scale, smooth_factor, proj_down, proj_up, bias, group_size


def quantizer_args(problem, act_bits, rotate=True):
    x, qweight, _, group_scale, smooth_factor, proj_down, _, _, group_size = problem
    padded = 2 * qweight.shape[1]
    return x, smooth_factor, proj_down, padded, group_size, rotate, group_scale is not None, act_bits


def w8a8_problem(m, n, k, dtype, static=True, zeros=True):
    x, qweight, scale, bias = w8_problem(m, n, k, dtype, dtype)
    zero_point = torch.randint(-128, 128, (n,), dtype=torch.int8, device="cuda") if zeros else None
    act_scale = torch.tensor(0.03, device="cuda") if static else None
    act_zero_point = torch.tensor(-37, dtype=torch.int8, device="cuda") if static else None
    return x, qweight, scale, zero_point, act_scale, act_zero_point, bias


def w4a16_problem(m, n, k, dtype, group_size=64, zeros=True, rank=0, smooth=False, rotate=False):
    group_size = group_size or -(-k // 32) * 32  # 0: one scale a row
    groups = -(-k // group_size)
    qweight = pack_int4(torch.randint(-8, 8, (n, groups * group_size), dtype=torch.int8, device="cuda"))
    scale = (torch.rand(n, groups, device="cuda") / 50 + 1e-2).to(dtype)
    zero_point = torch.randint(-8, 8, (n, groups), dtype=torch.int8, device="cuda") if zeros else None
    smooth_factor = torch.rand(k, device="cuda") + 0.5 if smooth else None
    down, up = (randn(s, rank, dtype=dtype) / 8 for s in (k, n)) if rank else (None, None)
    x, bias = randn(m, k, dtype=dtype), randn(n, dtype=dtype)
    return x, qweight, scale, zero_point, smooth_factor, down, up, bias, group_size, rotate


def bitnet_problem(m, n, k, dtype):
    x, _, scale, bias = w8_problem(m, n, k, dtype, dtype)
    return x, pack_ternary(torch.randint(-1, 2, (n, k), device="cuda")), scale, bias


def operations(m=33, n=96, k=128, half=torch.bfloat16):
    """One call of each op, as (op, x, the other arguments)."""
    problems = [
        (ops.w8a32_linear, w8_problem(m, n, k, torch.float32, torch.float32)),
        (ops.w8a16_linear, w8_problem(m, n, k, half, half)),
        (ops.svdq_linear, (*svdq_problem(m, n, k, 64, True, torch.bfloat16), True, 4)),
        (ops.w8a8_linear, w8a8_problem(m, n, k, torch.bfloat16)),
        (ops.w4a16_linear, w4a16_problem(m, n, k, torch.bfloat16, 64, True, 32, True, True)),
        (ops.bitnet_linear, bitnet_problem(m, n, k, half)),
    ]
    return [(op, problem[0], problem[1:]) for op, problem in problems]


OPS = ["w8a32", "w8a16", "svdq", "w8a8", "w4a16", "bitnet"]


# ---- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_w8a16_is_right_to_the_rounding_of_its_output(m, n, k, dtype):
    problem = w8_problem(m, n, k, dtype, None if m == 2 else dtype)
    y = ops.w8a16_linear(*problem)
    assert y.dtype == dtype and y.shape == (m, n)
    assert relative(y, w8_truth(*problem)) < EPSILON[dtype]


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_w8a32_has_the_accuracy_of_float32(m, n, k):
    problem = w8_problem(m, n, k, torch.float32, torch.float32)
    assert relative(ops.w8a32_linear(*problem), w8_truth(*problem)) < EPSILON[torch.float32]  # TF32 would be at 2e-4


def test_the_three_terms_of_a_float32_add_up_to_it_exactly():
    numbers = torch.cat([torch.randn(50, device="cuda") * 10.0**p for p in (-25, -15, -3, 0, 3, 20, 37)])
    numbers = numbers[numbers.isfinite()]
    one = torch.ones(1, 1, dtype=torch.int8, device="cuda")
    y = ops.w8a32_linear(numbers[:, None], one, torch.ones(1, device="cuda"), None)
    assert torch.equal(y[:, 0], numbers)


def test_w8a32_keeps_infinity_and_nan_where_they_are():
    x = torch.randn(3, 40, device="cuda")
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    qweight = torch.randint(1, 128, (8, 40), dtype=torch.int8, device="cuda")
    y = ops.w8a32_linear(x, qweight, torch.ones(8, device="cuda"), None)
    assert y[0].eq(float("inf")).all() and y[1].isnan().all() and y[2].isfinite().all()


def test_w8a16_sums_beyond_the_range_of_float16():
    x = torch.full((17, 4096), 60000.0, dtype=torch.float16, device="cuda")
    qweight = torch.full((64, 4096), 127, dtype=torch.int8, device="cuda")
    y = ops.w8a16_linear(x, qweight, torch.full((64,), 1e-6, device="cuda"), None)
    assert torch.allclose(y.float(), torch.tensor(60000.0 * 127 * 4096 * 1e-6, device="cuda"), rtol=1e-3)


def assert_codes(problem, act_bits, rotate):
    args = quantizer_args(problem, act_bits, rotate)
    two_level = args[6]
    codes, scale, lora_act = ops.svdq_quantize(*args)
    ref_codes, ref_scale, ref_lora = reference.svdq_quantize(*(a.cpu() if torch.is_tensor(a) else a for a in args))
    off = (codes.cpu().int() - ref_codes.int()).abs()
    assert off.max() <= (16 if two_level and act_bits == 4 else 1)
    assert off.ne(0).float().mean() < 2e-3  # numbers in the middle of two codes, where the order of a sum decides
    assert torch.allclose(scale.cpu(), ref_scale, rtol=1e-5, atol=0)
    assert relative(lora_act.cpu(), ref_lora) < (4e-6 if args[0].dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", GROUPS)
def test_codes_equal_the_reference_for_every_group_size(group_size, mode):
    two_level, act_bits = MODES[mode]
    assert_codes(svdq_problem(17, 16, 4096, group_size, two_level, torch.bfloat16), act_bits, rotate=True)


@pytest.mark.parametrize("m, k", [(1, 77), (65, 3000), (5, 10000)])  # a tile of 2048 features, of 4096, several
@pytest.mark.parametrize("mode, rotate", [(mode, True) for mode in MODES] + [("two_level", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_equal_the_reference_for_every_type_and_length(dtype, mode, rotate, m, k):
    two_level, act_bits = MODES[mode]
    assert_codes(svdq_problem(m, 16, k, 64, two_level, dtype), act_bits, rotate)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_without_rotation_are_those_of_the_reference_but_for_exact_ties(dtype, smooth):
    """Nothing is summed then, so only a quotient that lands on a tie can differ, by its last bit."""
    args = quantizer_args(svdq_problem(64, 16, 4096, 64, True, dtype, smooth=smooth), 4, rotate=False)
    codes, _, _ = ops.svdq_quantize(*args)
    ref_codes, _, _ = reference.svdq_quantize(*(a.cpu() if torch.is_tensor(a) else a for a in args))
    assert codes.cpu().ne(ref_codes).float().mean() < 1e-5


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(
    "mode, dtype",
    [(mode, torch.bfloat16) for mode in MODES] + [("two_level", torch.float16), ("two_level", torch.float32)],
)
def test_svdq_is_the_product_of_its_codes(mode, dtype, m, n, k):
    two_level, act_bits = MODES[mode]
    assert_svdq(svdq_problem(m, n, k, 64, two_level, dtype), act_bits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("m", [3, 200])
def test_svdq_for_every_group_size(m, group_size, mode):
    two_level, act_bits = MODES[mode]
    assert_svdq(svdq_problem(m, 300, 520, group_size, two_level, torch.bfloat16), act_bits)


@pytest.mark.parametrize("rank", [0, 5, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [3, 200])
def test_svdq_for_every_rank(m, dtype, rank):
    assert_svdq(svdq_problem(m, 300, 520, 64, True, dtype, rank, smooth=False), 4)


def assert_svdq(problem, act_bits):
    x, qweight, scale, group_scale, _, _, proj_up, bias, group_size = problem
    y = ops.svdq_linear(*problem, True, act_bits)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], qweight.shape[0])
    made = ops.svdq_quantize(*quantizer_args(problem, act_bits))
    truth = reference.svdq_gemm(*made, qweight, scale, group_scale, proj_up, bias, group_size, torch.float64)
    assert relative(y, truth) < EPSILON[x.dtype] * (5 if x.dtype == torch.float32 else 1)


@pytest.mark.parametrize("static, zeros", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_w8a8_is_the_product_of_its_codes(m, n, k, static, zeros):
    for dtype in (torch.bfloat16, torch.float32):
        problem = w8a8_problem(m, n, k, dtype, static, zeros)
        assert relative(ops.w8a8_linear(*problem), reference.w8a8_linear(*problem)) < EPSILON[dtype]


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_bitnet_is_the_product_of_its_codes(m, n, k):
    for dtype in (torch.bfloat16, torch.float32):
        problem = bitnet_problem(m, n, k, dtype)
        assert relative(ops.bitnet_linear(*problem), reference.bitnet_linear(*problem)) < EPSILON[dtype]


@pytest.mark.parametrize("m", [1, 8, 16, 64, 512])
def test_bitnet_finds_every_code_in_its_place(m):
    codes = torch.randint(-1, 2, (64, 512), device="cuda")
    x = torch.eye(512, device="cuda")
    parts = [ops.bitnet_linear(part, pack_ternary(codes), torch.ones(64, device="cuda"), None) for part in x.split(m)]
    assert torch.equal(torch.cat(parts).round(), codes.t().float())


@pytest.mark.parametrize(
    "group_size, zeros", [(16, True), (32, False), (64, True), (128, False), (256, True), (0, True)]
)
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", [*TOKENS, 8])
def test_w4a16_is_the_product_of_its_weight(m, n, k, group_size, zeros):
    for dtype in (torch.bfloat16, torch.float16):
        problem = w4a16_problem(m, n, k, dtype, group_size, zeros)
        x, qweight, scale, zero_point, *_, bias, group, _ = problem
        weight = reference.w4_residual(qweight, scale, zero_point, group).double()[:, :k]
        truth = x.double() @ weight.t() + bias.double()
        assert relative(ops.w4a16_linear(*problem), truth) < EPSILON[dtype]


@pytest.mark.parametrize("m", [1, 17, 1024])
@pytest.mark.parametrize(
    "rank, smooth, rotate", [(0, True, True), (5, False, False), (32, True, True), (128, False, True)]
)
def test_w4a16_with_each_of_its_parts(m, rank, smooth, rotate):
    problem = w4a16_problem(m, 300, 1000, torch.bfloat16, 64, True, rank, smooth, rotate)
    assert relative(ops.w4a16_linear(*problem), reference.w4a16_linear(*problem)) < 2 * EPSILON[torch.bfloat16]


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", TOKENS)
def test_nvfp4_is_the_product_of_its_codes_or_refused(m, n, k):
    gpu = pytest.importorskip("qgraft.kernels.gpu.nvfp4")
    x, weight = randn(m, k, dtype=torch.bfloat16), nvfp4.nvfp4_quantize(randn(n, k))
    bias = randn(n, dtype=torch.bfloat16)
    if not gpu.has_nvfp4(gpu.target_of(x)):
        with pytest.raises(RuntimeError, match="NVFP4 needs the tensor cores of Blackwell"):
            gpu.nvfp4_linear(x, *weight, bias)
        return
    for got, wanted in zip(gpu.quantize(x), nvfp4.nvfp4_quantize(x), strict=True):
        assert torch.equal(got.float(), wanted.float())
    y = gpu.nvfp4_linear(x, *weight, bias)
    assert relative(y, nvfp4.nvfp4_linear(x, *weight, bias)) < EPSILON[torch.bfloat16]
    assert torch.equal(gpu.nvfp4_linear(x, *weight, bias), y)


def test_packed_unpacking_finds_every_code_in_its_place():
    """One feature at a time, all codes, all group integers: assembly that mixed up lanes would show here."""
    codes = torch.arange(-8, 8, dtype=torch.int8, device="cuda").repeat(64, 16)  # (64, 256)
    codes = torch.stack([row.roll(i) for i, row in enumerate(codes)])
    x = torch.eye(256, device="cuda", dtype=torch.bfloat16)
    scale = torch.ones(64, 4, device="cuda", dtype=torch.bfloat16)
    for m in (8, 16, 64, 256):
        for start in range(0, 256, m):
            part = x[start : start + m].contiguous()
            wanted = codes.float().t()[start : start + m]
            y = ops.w4a16_linear(part, pack_int4(codes), scale, None, None, None, None, None, 64, False)
            assert torch.equal(y.float(), wanted)
            integers = torch.randint(1, 17, (64, 4), dtype=torch.uint8, device="cuda")
            args = (pack_int4(codes), torch.ones(64, device="cuda"), integers, None, None, None, None, 64, False, 8)
            y = ops.svdq_linear(part.float(), *args)
            folded = codes.float() * integers.float().repeat_interleave(64, 1)
            assert torch.allclose(y, folded.t()[start : start + m], rtol=1e-6, atol=1e-4)


def test_svdq_takes_the_largest_sums():
    x = torch.ones(20, 8192, device="cuda")
    qweight = pack_int4(torch.full((70, 8192), -8, dtype=torch.int8, device="cuda"))
    group_scale = torch.full((70, 128), LARGEST, dtype=torch.uint8, device="cuda")
    y = ops.svdq_linear(x, qweight, torch.ones(70, device="cuda"), group_scale, None, None, None, None, 64, False, 8)
    assert torch.allclose(y, torch.full_like(y, -128.0 * 8192), rtol=1e-6)


def test_offsets_past_two_gigabytes():
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB of memory")
    m, n, k = 600_000, 16, 4096  # x has 2.5e9 numbers
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-5:] = randn(5, k, dtype=torch.bfloat16)
    _, qweight, scale, _ = w8_problem(1, n, k, torch.bfloat16)
    y = ops.w8a16_linear(x, qweight, scale, None)
    assert y[:-5].eq(0).all() and relative(y[-5:], w8_truth(x[-5:], qweight, scale, None)) < 3e-3
    few = svdq_problem(1, n, k, 64, True, torch.bfloat16)[1:7]
    y = ops.svdq_linear(x, *few, None, 64, True, 4)
    assert y[:-5].eq(0).all()
    assert relative(y[-5:], ops.svdq_linear(x[-5:], *few, None, 64, True, 4)) < 3e-3


@pytest.mark.parametrize("m", [1, 16, 33])
@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_two_runs_are_equal_to_the_bit(which, m):
    """Also where many programs share a sum, in whatever order they arrive; and they leave their counters at zero."""
    op, x, rest = operations(m, 256, 8192)[which]
    first = op(x, *rest)
    assert all(torch.equal(op(x, *rest), first) for _ in range(50))


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_two_streams_do_not_share_a_sum(which):
    op, x, rest = operations(1, 256, 16384)[which]
    wanted = op(x, *rest)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(op(x, *rest))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in results)


def test_graphs_that_run_side_by_side_do_not_share_a_sum():
    op, x, rest = operations(1, 256, 16384)[1]
    wanted, graphs = op(x, *rest), []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [op(x, *rest) for _ in range(20)]
        graphs.append((graph, results, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in range(10):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for _, results, _ in graphs for y in results)


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_empty_and_strided_inputs(which):
    op, x, rest = operations()[which]
    whole = op(x, *rest)
    assert op(x[:0], *rest).shape == (0, whole.shape[1])
    assert torch.equal(op(x.t().contiguous().t(), *rest), whole)
    assert torch.equal(op(x[::3], *rest), op(x[::3].clone(), *rest))


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_a_wrong_type_is_an_error_that_says_so(which):
    op, x, rest = operations()[which]
    with pytest.raises(TypeError, match=r"x must be .*, got float64"):
        op(x.double(), *rest)


# ---- with the rest of torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_torch_compile_in_one_graph_for_any_number_of_tokens(which):
    op, _, rest = operations()[which]

    def layer(x):
        return torch.relu(op(x * 2, *rest))

    dtype, k = operations()[which][1].dtype, 128
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (5, 64, 300):
        x = randn(m, k, dtype=dtype)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_a_cuda_graph_replays_with_new_numbers(which):
    op, x, rest = operations()[which]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which a capture must not
        op(x, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x, *rest)
    fresh = torch.randn_like(x)
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, op(fresh, *rest))


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_the_current_stream_is_used(which):
    op, x, rest = operations()[which]
    wanted = op(x, *rest)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # long enough that a launch on another stream would read the zeros
        late.copy_(x)
        y = op(late, *rest)
    stream.synchronize()
    assert torch.equal(y, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    problem = w8_problem(33, 96, 128, torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert relative(ops.w8a16_linear(*problem), w8_truth(*problem)) < 3e-3
    problem = svdq_problem(33, 96, 128, 64, True, torch.bfloat16, device="cuda:1")
    assert ops.svdq_linear(*problem, True, 4).device == torch.device("cuda:1")
    with pytest.raises(ValueError, match="qweight is on cuda:0 and x on cuda:1"):
        x, qweight, scale, _ = w8_problem(33, 96, 128, torch.bfloat16)
        ops.w8a16_linear(x.to("cuda:1"), qweight, scale, None)


@pytest.mark.parametrize("which", range(len(OPS)), ids=OPS)
def test_gradients_flow_as_through_the_dequantized_layer(which):
    op, x, rest = operations(half=torch.float16)[which]
    if which < 2:
        weight = reference.w8_dequantize(*rest[:2])
    elif which == 3:
        weight = reference.w8a8_dequantize(x.shape[1], *rest[:3])
    elif which == 4:
        *tensors, _, group_size, rotate = rest
        weight = reference.w4a16_dequantize(x.shape[1], *tensors, group_size, rotate)
    elif which == 5:
        weight = reference.bitnet_dequantize(x.shape[1], *rest[:2])
    else:
        qweight, scale, group_scale, smooth_factor, proj_down, proj_up, _, group_size, rotate, _ = rest
        weight = reference.svdq_dequantize(
            x.shape[1], qweight, scale, group_scale, smooth_factor, proj_down, proj_up, group_size, rotate
        )
    x.requires_grad_(True)
    y = op(x, *rest)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad.dtype == x.dtype
    assert relative(x.grad, grad.double() @ weight.double()) < EPSILON[x.dtype]
