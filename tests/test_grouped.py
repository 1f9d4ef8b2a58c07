"""w8_group and w4_group: what files of other tools hold, and the products with it, against float64."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from qgraft import Quantizer, Recipe, W4GroupLinear, W8GroupLinear, load, save
from qgraft.kernels import ops, reference
from qgraft.kernels.cpu import native
from qgraft.kernels.packing import unpack_int4
from qgraft.layers.base import storage_bytes

# Options of native.build that take instructions away: one machine stands for older ones.
VARIANTS = {"native": (), "no-bf16": ("-mno-avx512bf16",), "avx2": ("-mno-avx512f",), "torch": None}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
OPTIONS = [
    (W8GroupLinear, {}),
    (W8GroupLinear, {"group_size": 128, "zero_point": True}),
    (W8GroupLinear, {"group_size": "channel", "zero_point": True, "order": True}),
    (W4GroupLinear, {}),
    (W4GroupLinear, {"group_size": 64, "zero_point": True, "order": True, "scale_dtype": "float16"}),
    (W4GroupLinear, {"offset": True, "order": True, "scale_dtype": "bfloat16"}),
    (W4GroupLinear, {"group_size": "channel", "offset": True}),
]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def fill_at_random(layer):
    """Any state that a file may hold, not only what quantize() makes."""
    if layer.qweight.dtype is torch.int8:
        layer.qweight = torch.randint(-128, 128, layer.qweight.shape, dtype=torch.int8)
    else:
        layer.qweight = torch.randint(0, 256, layer.qweight.shape, dtype=torch.uint8)
    layer.scale = (torch.rand(layer.scale.shape) * 0.01 + 0.001).to(layer.scale.dtype)
    if layer.zero_point is not None:
        low, high = (-128, 128) if layer.qweight.dtype is torch.int8 else (-8, 9)
        layer.zero_point = torch.randint(low, high, layer.zero_point.shape, dtype=torch.int8)
    if getattr(layer, "offset", None) is not None:
        layer.offset = torch.randn(layer.offset.shape) * 0.02
    if layer.order is not None:
        layer.order = torch.randperm(layer.in_features, dtype=torch.int32)
    return layer


def weight_in_float64(layer):
    """The effective weight from the layer's buffers, element by element of the formula."""
    n, k = layer.out_features, layer.in_features
    codes = layer.qweight if layer.qweight.dtype is torch.int8 else unpack_int4(layer.qweight)
    weight = torch.zeros(n, k, dtype=torch.float64)
    for j in range(k):
        group = j // layer.group_size
        column = codes[:, j].double()
        if layer.zero_point is not None:
            column = column - layer.zero_point[:, group].double()
        column = column * layer.scale[:, group].double()
        if getattr(layer, "offset", None) is not None:
            column = column + layer.offset[:, group].double()
        weight[:, j if layer.order is None else int(layer.order[j])] = column
    return weight


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request):
    if VARIANTS[request.param] is None:
        return None
    try:
        return native._load(native.build(VARIANTS[request.param]))
    except native.Unavailable as why:
        if "could not compile" in str(why):
            raise
        pytest.skip(str(why))


@pytest.mark.parametrize("cls, options", OPTIONS, ids=str)
def test_the_product_is_that_of_the_formula_in_float64(compiled, monkeypatch, cls, options):
    monkeypatch.setattr(native, "library", lambda: compiled)
    for k, n in ((77, 45), (1300, 70), (1, 1)):
        layer = fill_at_random(cls(k, n, **options))
        layer.bias.data.normal_()
        weight = weight_in_float64(layer)
        # Beside what is added up: a single code times its scale, and its offset, may nearly cancel.
        added = weight.norm() + (layer.offset.double().norm() if options.get("offset") else 0)
        assert (layer.dequantize().double() - weight).norm() <= 1e-6 * added
        for dtype in TOLERANCE:
            for m in (1, 17, 70):
                x = torch.randn(m, k).to(dtype)
                y = layer(x)
                # A float for each group is added after the product is rounded to x's type.
                limit = TOLERANCE[dtype] * (3 if options.get("offset") else 1)
                product = x.double() @ weight.t()
                bias = layer.bias.double().expand_as(product)
                # Beside what is added up: product and bias of a single number may nearly cancel.
                error = (y.double() - (product + bias)).norm() / (product.norm() + bias.norm())
                assert y.dtype is dtype and error < limit


@pytest.mark.parametrize("cls, options", OPTIONS, ids=str)
def test_a_quantized_layer_is_near_the_float_one_and_saves_and_loads(cls, options, tmp_path):
    k, n = 160, 48
    linear = nn.Linear(k, n)
    weight = linear.weight.detach().clone() + 0.05  # not centred, as zero points and offsets are for
    linear.weight = nn.Parameter(weight.clone())
    scheme = {"name": cls.scheme_name} | options
    model = Quantizer(nn.Sequential(linear)).quantize(Recipe.from_dict({"scheme": scheme}), progress=False)
    bits = 8 if cls is W8GroupLinear else 4
    assert relative(model[0].dequantize(), weight) < (0.01 if bits == 8 else 0.25)
    assert storage_bytes(model[0]) < (bits / 8 + 0.3) * k * n + 5 * k + 4 * n
    fill_at_random(model[0])
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", model=nn.Sequential(nn.Linear(k, n)))
    x = torch.randn(3, k)
    assert torch.equal(again(x), model(x))
    for name, buffer in model[0].named_buffers():
        assert torch.equal(again[0].get_buffer(name), buffer)


@pytest.mark.parametrize("cls, option", [(W8GroupLinear, "zero_point"), (W4GroupLinear, "zero_point"),
                                         (W4GroupLinear, "offset")])  # fmt: skip
def test_a_zero_point_and_an_offset_pay_where_weights_lie_to_one_side(cls, option):
    linear = nn.Linear(128, 32)
    linear.weight.data = torch.rand(32, 128) + 0.5
    with_it = cls.from_linear(linear, **{option: True}).dequantize()
    assert relative(with_it, linear.weight) < 0.85 * relative(cls.from_linear(linear).dequantize(), linear.weight)


def test_scales_of_a_group_are_finer_than_those_of_a_row():
    linear = nn.Linear(256, 32)
    linear.weight.data[:, 7] *= 50
    errors = [
        relative(W8GroupLinear.from_linear(linear, group_size=g).dequantize(), linear.weight)
        for g in (32, 128, "channel")
    ]
    assert errors[0] < errors[1] < errors[2]


def test_gradients_are_those_of_the_dequantized_weight():
    for cls, options in OPTIONS:
        layer = fill_at_random(cls(77, 45, **options))
        x = torch.randn(3, 5, 77, requires_grad=True)
        grad = torch.randn(3, 5, 45)
        layer(x).backward(grad)
        assert relative(x.grad, grad.double() @ weight_in_float64(layer)) < 1e-6


def test_bad_options_and_operands_are_said_in_words():
    with pytest.raises(ValueError, match="either an offset or a zero_point"):
        W4GroupLinear(64, 64, offset=True, zero_point=True)
    with pytest.raises(ValueError, match="group_size"):
        W8GroupLinear(64, 64, group_size=48)
    x, qweight = torch.randn(2, 64), torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"w8_group_linear: scale must have shape \(4, 2\), got \(4, 1\)"):
        ops.w8_group_linear(x, qweight, torch.ones(4, 1), None, None, 32)
    with pytest.raises(TypeError, match="w8_group_linear: qweight must be int8, got int32"):
        ops.w8_group_linear(x, qweight.int(), torch.ones(4, 2), None, None, 32)


# Under Triton's interpreter, which has to be chosen before a kernel is defined; it knows no bfloat16.
INTERPRETED = """
import pickle, sys
from qgraft.kernels.gpu.w8_group import w8_group_linear
pickle.dump([w8_group_linear(*args) for args in pickle.load(sys.stdin.buffer)], sys.stdout.buffer)
"""


def test_the_gpu_kernel_is_the_reference_under_the_interpreter():
    pytest.importorskip("triton")
    cases = []
    for dtype in (torch.float32, torch.float16):
        for m, n, k, g in ((1, 37, 77, 16), (5, 8, 2100, 128), (3, 4, 64, 64)):
            groups = -(-k // g)
            zero = torch.randint(-128, 128, (n, groups), dtype=torch.int8) if m > 1 else None
            qweight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
            bias = torch.randn(n).to(dtype) if m != 3 else None
            cases.append((torch.randn(m, k).to(dtype), qweight, torch.rand(n, groups) * 0.01, zero, bias, g))
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], input=pickle.dumps(cases), stdout=subprocess.PIPE, check=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    for args, y in zip(cases, pickle.loads(run.stdout), strict=True):
        exact = reference.w8_group_linear(args[0].double(), *args[1:])
        assert y.dtype is args[0].dtype and relative(y, exact) < TOLERANCE[y.dtype]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_gpu_kernel_compiles_without_spilling(target):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the kernels are interpreted")
    from qgraft.kernels.gpu import ahead, w8_group

    x, bias = torch.empty(4, 512, dtype=torch.bfloat16, device="meta"), None
    codes = torch.empty(64, 512, dtype=torch.int8, device="meta")
    zero = torch.empty(64, 16, dtype=torch.int8, device="meta")
    with ahead.launches(target) as launches:
        w8_group.w8_group_linear(x, codes, torch.empty(64, 16, device="meta"), zero, bias, 32)
    assert [ahead.built(launch, target, disassemble=False)["spilled"] for launch in launches] == [0]
