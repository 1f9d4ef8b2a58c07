"""1x1 convolutions: quantized as linear layers over the channels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, QuantLinear, Recipe, load, save
from qgraft.layers import SCHEMES
from qgraft.quantizer.errors import CheckpointError


def recipe(scheme, *rules):
    return Recipe.from_dict({"scheme": scheme, "rules": list(rules), "min_features": 1})


def quantize(model, what, **kw):
    return Quantizer(model).quantize(what, progress=False, **kw)


def relative(y, exact):
    return ((y.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.filterwarnings("ignore:bitnet is a format")
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_the_convolution_of_its_weight(name):
    torch.set_default_dtype(torch.float32)
    conv = nn.Conv2d(64, 48, 1, stride=(2, 1))
    data = torch.randn(4, 64, 6, 5)
    options = {"rank": 8} if name == "factorized" else {"rank": 4} if "svd" in name else {}
    layer = quantize(copy.deepcopy(conv), recipe({"name": name, **options}), calibration=[data])
    assert type(layer) is SCHEMES[name] and layer.bias.shape == (48,)
    x = torch.randn(3, 64, 7, 9)
    pixels = x[:, :, ::2].movedim(1, -1)
    linear = copy.deepcopy(layer)
    linear.stride = None
    y = layer(x)
    assert y.shape == (3, 48, 4, 9) and y.is_contiguous()
    torch.testing.assert_close(y.movedim(1, -1), linear(pixels))
    # Rounding of activations apart, it is the float convolution with the dequantized weight.
    exact = F.conv2d(x, layer.dequantize()[:, :, None, None], conv.bias, stride=(2, 1))
    assert relative(y, exact) < (0.2 if "a4" in name else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_memory_formats_types_and_gradients(dtype):
    conv = nn.Conv2d(19, 22, 1, padding="same", bias=False).to(dtype)
    layer = quantize(copy.deepcopy(conv), recipe("w8a16"))
    x = torch.randn(2, 19, 4, 6, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and relative(y, conv(x)) < 0.02
    turned = layer(x.to(memory_format=torch.channels_last))
    assert turned.is_contiguous(memory_format=torch.channels_last) and torch.equal(turned, y)
    # Another number of tokens may add up in another order, and that round to the next number of 16 bits.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x[1]), y[1], rtol=2 * rounding, atol=2 * rounding)
    assert layer(x[:0]).shape == (0, 22, 4, 6)
    for bad in (x[0, 0], x.movedim(1, -1), x[None]):
        with pytest.raises(ValueError, match=r"takes input of shape \(B, 19, H, W\)"):
            layer(bad)
    x.requires_grad_()
    layer(x).sum().backward()
    grad = layer.dequantize().sum(0)[None, :, None, None].expand_as(x)
    assert relative(x.grad, grad) < 0.02


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 1, groups=16)
        self.expand = nn.Conv2d(16, 32, 1, stride=2)
        self.project = nn.Conv2d(32, 16, 1)
        self.padded = nn.Conv2d(16, 16, 1, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.depthwise(self.stem(x)))
        x = self.padded(self.project(torch.relu(self.expand(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("scheme", ["w8a32", "w4a8_svd"])
def test_plan_calibration_save_and_load(scheme, tmp_path):
    model, data = Net().eval(), torch.randn(4, 3, 16, 16)
    skeleton, exact = copy.deepcopy(model), model(data)
    options = {"name": scheme, "rank": 2, "group_size": 16} if scheme == "w4a8_svd" else scheme
    what = recipe(options, {"match": "Conv2d", "scheme": options})
    plan = Quantizer(model).plan(what)
    assert [(p.name, p.kind) for p in plan.todo] == [("expand", "Conv2d"), ("project", "Conv2d"), ("head", "Linear")]
    assert [u.name for u in plan.uncovered] == ["stem.weight", "depthwise.weight", "padded.weight"]
    assert "Not in linear layers: Conv2d" in str(plan)
    quantize(model, what, calibration=[data])
    report = Quantizer(model).report.layers
    assert [row.tokens for row in report] == [4 * 64, 4 * 64, 4] and all(row.output_sqnr > 15 for row in report)
    assert sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}) == plan.bytes_after
    y = model(data)
    assert relative(y, exact) < (0.02 if scheme == "w8a32" else 0.2)
    assert not Quantizer(model).plan(what).todo  # the rule for Conv2d still finds its layers
    assert "stride=(2, 2)" in repr(model.expand) and model.expand.kernel_size == (1, 1)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(data), y)
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", model=copy.deepcopy(skeleton))(data), y)
    skeleton.expand = nn.Conv2d(16, 32, 3, stride=2, padding=1)
    with pytest.raises(CheckpointError, match="'expand' is a Conv2d in the model, not a linear layer"):
        load(tmp_path / "out", model=skeleton)


def test_two_convolutions_of_one_input_with_different_strides_have_statistics_of_their_own():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.some = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, stride=3)

        def forward(self, x):
            return self.all(x).sum() + self.some(x).sum()

    model = quantize(Both(), recipe({"name": "w4a16"}), calibration=[torch.randn(2, 16, 6, 6)])
    assert [row.tokens for row in Quantizer(model).report.layers] == [72, 8]


def test_a_subclass_of_a_convolution_is_left_with_a_reason():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(16, 16, 1), nn.Conv2d(16, 16, 1))
    odd, plain = Quantizer(model).plan(recipe("w8a32")).layers
    assert odd.scheme is None and "subclass of nn.Conv2d" in odd.reason and plain.scheme is not None
    assert isinstance(quantize(model, recipe("w8a32"))[1], QuantLinear)
