"""BitNet b1.58: the op, the layer, and training with straight-through gradients."""

from itertools import pairwise

import pytest
import torch

from qgraft import BitLinear, BitNetLinear, Quantizer, load, save
from qgraft.kernels import ops, reference
from qgraft.kernels.packing import pack_ternary, unpack_ternary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def op_args(dtype=torch.float32, m=5, k=77, n=33, bias=True):
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    args = torch.randn(m, k).to(dtype), pack_ternary(codes), torch.rand(n) + 0.1, torch.randn(n).to(dtype)
    return codes, args if bias else (*args[:3], None)


# ---- packing and the op ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 64, 77])
def test_ternary_packing_round_trips_and_pads_with_code_0(k):
    codes = torch.randint(-1, 2, (3, 5, k), dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.shape == (3, 5, -(-k // 4)) and packed.dtype is torch.uint8
    back = unpack_ternary(packed)
    assert torch.equal(back[..., :k], codes) and not back[..., k:].any()


def test_ternary_packing_puts_the_first_code_in_the_lowest_bits():
    assert pack_ternary(torch.tensor([[-1, 0, 1, 1, 1]])).tolist() == [[0b10_10_01_00, 0b01_01_01_10]]
    for wrong in (-2, 2):
        with pytest.raises(ValueError, match="ternary codes are -1, 0 and 1"):
            pack_ternary(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", [(0, 48, 33), (1, 1, 1), (1, 130, 33), (17, 1024, 40), (65, 77, 300)])
def test_the_op_equals_its_formula_in_float64(dtype, m, k, n):
    for bias in (True, False):
        codes, args = op_args(dtype, m, k, n, bias)
        x, _, scale, b = args
        step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        act = (x.float() / step).round().double()
        product, shift = act @ codes.double().t() * step * scale, b.double() if bias else torch.zeros(n).double()
        exact = product + shift
        y = ops.bitnet_linear(*args)
        assert y.dtype is dtype and y.shape == (m, n)
        eps = torch.finfo(dtype).eps
        size = (product.abs() + shift.abs()).mean().item() if m else 0  # the two may cancel
        torch.testing.assert_close(y.double(), exact, rtol=3 * eps, atol=2 * eps * size)


@pytest.mark.parametrize("m", [1, 3, 16, 64])
def test_the_integer_sum_is_exact_in_the_worst_case(m):
    x, qweight = torch.full((m, 4096), 127.0), pack_ternary(torch.full((8, 4096), -1))
    assert torch.equal(ops.bitnet_linear(x, qweight, torch.ones(8), None), torch.full((m, 8), -127.0 * 4096))


def test_opcheck_passes_and_gradients_are_those_of_the_dequantized_weight():
    for bias in (True, False):
        _, (x, *rest) = op_args(bias=bias)
        torch.library.opcheck(ops.bitnet_linear.default, (x, *rest))
        torch.library.opcheck(ops.bitnet_linear.default, (x.requires_grad_(), *rest))
    grad = torch.randn(5, 33)
    ops.bitnet_linear(x, *rest).backward(grad)
    torch.testing.assert_close(x.grad, grad @ reference.bitnet_dequantize(77, *rest[:2]))


# ---- the layer to run -----------------------------------------------------------------------------------------------


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n, groups", [(77, 45, 1), (77, 45, 3), (1, 1, 1), (64, 48, 48), (130, 8, 2)])
def test_weights_are_ternary_by_the_mean_absolute_value_of_their_group(dtype, k, n, groups):
    trained = BitLinear(k, n, groups, bias=True, dtype=dtype)
    layer = trained.pack()
    expected = []
    for block in trained.weight.detach().double().chunk(groups):
        scale = block.abs().mean()
        expected.append((block / scale).round().clamp(-1, 1) * scale)
    # A weight at the tie between two codes may fall to either side in float32.
    wrong = (layer.dequantize().double() - torch.cat(expected)).abs() > 1e-5
    assert wrong.double().mean() < 0.02
    assert layer.scale.unique().numel() <= groups and layer.bias is trained.bias
    assert layer.qweight.shape == (n, -(-k // 4)) and layer.qweight.dtype is torch.uint8


def test_from_linear_warns_that_this_is_a_format_to_train_in():
    linear = torch.nn.Linear(256, 256)
    torch.nn.init.normal_(linear.weight)
    with pytest.warns(UserWarning, match=r"relative error 0\.51 for Gaussian weights"):
        layer = BitNetLinear.from_linear(linear)
    assert relative(layer.dequantize(), linear.weight) == pytest.approx(0.51, abs=0.02)


def test_the_plan_warns_too_and_the_recipe_leaves_the_head_alone():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(64, 64), "lm_head": torch.nn.Linear(64, 128)})
    plan = Quantizer(model).plan("bitnet")
    assert [layer.name for layer in plan.todo] == ["body"] and "format to train in" in plan.notes[0]
    assert "format to train in" in " ".join(str(plan).split())


def test_it_is_saved_and_loaded_as_it_is_trained_or_not(tmp_path):
    def model():
        return torch.nn.Sequential(torch.nn.Linear(77, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))

    packed = model()
    packed[0], packed[2] = BitLinear(77, 32, 2, bias=True).pack(), BitLinear(32, 5, bias=True).pack()
    save(packed, tmp_path / "out")
    x = torch.randn(3, 77)
    assert torch.equal(load(tmp_path / "out", model=model())(x), packed(x))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("shape", [(77,), (128, 77), (2, 3, 77), (0, 77)])
def test_bitlinear_computes_what_its_packed_form_computes(groups, shape):
    trained = BitLinear(77, 48, groups, bias=True)
    x = torch.randn(shape) * 10
    y = trained(x)
    assert y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, trained.pack()(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_pass_straight_through_both_roundings(dtype):
    layer, x = BitLinear(77, 45, 3, bias=True, dtype=dtype), torch.randn(2, 5, 77).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 45).to(dtype)
    layer(x).backward(grad)
    flat, g = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
    tolerance = 2e-2  # activations are rounded to 8 bits on the way to the weight's gradient
    assert relative(layer.weight.grad, g.t() @ flat) < tolerance
    assert relative(x.grad.flatten(0, 1), g @ layer.pack().dequantize().double()) < 5e-3
    assert relative(layer.bias.grad, g.sum(0)) < 5e-3


def test_bitlinear_compiles_to_one_graph_and_trains_under_autocast():
    layer, x = BitLinear(64, 48), torch.randn(6, 64)
    compiled = torch.compile(layer, fullgraph=True)
    compiled(x).sum().backward()
    grad = layer.weight.grad.clone()
    torch.testing.assert_close(compiled(x), layer(x))
    layer.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16 and relative(layer.weight.grad, grad) < 0.02


def network(layer) -> torch.nn.Sequential:
    blocks = [(torch.nn.LayerNorm(k), layer(k, n), torch.nn.SiLU()) for k, n in pairwise((16, 64, 64, 4))]
    return torch.nn.Sequential(*[module for block in blocks for module in block][:-1])


@pytest.fixture
def one_thread():
    """Small products are slower on two threads, by far where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_trained_network_beats_one_that_is_made_ternary_afterwards(one_thread):
    centers, labels = 1.2 * torch.randn(24, 16), torch.arange(24) % 4
    which = torch.randint(0, 24, (5000,))
    x, y = centers[which] + 0.7 * torch.randn(5000, 16), labels[which]

    def train(net):
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
        for _ in range(300):
            rows = torch.randint(0, 3000, (128,))
            loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net

    def wrong(net):
        return (net(x[3000:]).argmax(1) != y[3000:]).double().mean().item()

    plain, trained = train(network(lambda k, n: torch.nn.Linear(k, n, bias=False))), train(network(BitLinear))
    before = wrong(trained)
    for net in (plain, trained):
        for name, module in list(net.named_modules()):
            if isinstance(module, BitLinear):
                net.set_submodule(name, module.pack())
            elif isinstance(module, torch.nn.Linear):
                net.set_submodule(name, BitNetLinear.from_linear(module))
    assert wrong(trained) < 0.8 * wrong(plain), (wrong(trained), wrong(plain))
    assert wrong(trained) == pytest.approx(before, abs=0.005)  # packing changes the order of sums, no more


# ---- what zeta's layer gets wrong -----------------------------------------------------------------------------------


def test_the_examples_of_zetas_documentation_run():
    for layer in (BitLinear(10, 20), BitLinear(10, 20, groups=2), torch.nn.Sequential(BitLinear(10, 20))):
        assert layer(torch.randn(128, 10)).shape == (128, 20)


def test_the_output_has_the_size_of_its_input_and_zero_gives_zero():
    layer, x = BitLinear(512, 256), torch.randn(64, 512)
    full = torch.nn.functional.linear(x, layer.weight)
    assert layer(x).std().item() == pytest.approx(full.std().item(), rel=0.35)
    assert torch.equal(layer(8 * x), 8 * layer(x))  # a power of two: no rounding that could tip a code
    assert layer(torch.zeros(3, 512)).abs().max() == 0


@pytest.mark.parametrize("groups", [0, 3, -1, 2.0, True])
def test_groups_that_do_not_divide_the_rows_are_refused(groups):
    with pytest.raises(ValueError, match="groups must be a whole number that divides out_features 20"):
        BitLinear(10, 20, groups)


def test_packing_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="meta"):
        BitLinear(10, 20, device="meta").pack()
    broken = BitLinear(10, 20)
    broken.weight.data[3, 4] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        broken.pack()
    with pytest.raises(ValueError, match="at least one feature"):
        BitLinear(0, 20)
