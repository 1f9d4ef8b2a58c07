"""What is quantized besides `nn.Linear`: transformers' Conv1D, embeddings, fused experts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, QuantLinear, Recipe, load, save
from qgraft.layers import SCHEMES

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def recipe(scheme, *rules, **more):
    return Recipe.from_dict({"scheme": scheme, "rules": list(rules), "min_features": 1, **more})


def quantize(model, what, **kw):
    return Quantizer(model).quantize(what, progress=False, **kw)


# -- Conv1D ----------


def conv1d(k, n, dtype=torch.float32):
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)
    nn.init.normal_(conv.bias)
    return conv.to(dtype)


def gpt2(**kw):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=61, n_positions=32, **kw)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_conv1d_becomes_the_layer_that_the_same_linear_would_become(dtype):
    conv = conv1d(35, 22, dtype)
    linear = nn.Linear(35, 22, dtype=dtype)
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    x = torch.randn(3, 5, 35, dtype=dtype)
    torch.testing.assert_close(conv(x), linear(x))
    for scheme in ("w8a32", "w8a16", "w4a16"):
        theirs, ours = quantize(conv, recipe(scheme)), quantize(linear, recipe(scheme))
        assert type(theirs) is SCHEMES[scheme] and theirs.bias is conv.bias
        assert (theirs.in_features, theirs.out_features, theirs.dtype) == (35, 22, dtype)
        assert torch.equal(theirs.dequantize(), ours.dequantize()) and torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize("scheme", ["w8a32", "w4a4_svd"])
def test_gpt2_end_to_end(scheme, tmp_path):
    model, tokens = gpt2(), torch.randint(0, 61, (2, 9))
    skeleton = copy.deepcopy(model)
    options = {"name": "w4a4_svd", "rank": 4, "group_size": 16} if scheme == "w4a4_svd" else scheme
    what = recipe(options, {"match": "Conv1D", "scheme": options})
    exact = model(tokens).logits
    plan = Quantizer(model).plan(what)
    assert len(plan.todo) == 8 and {layer.kind for layer in plan.todo} == {"Conv1D"}
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in plan.todo}
    assert shapes["transformer.h.0.attn.c_attn"] == (144, 48) and shapes["transformer.h.1.mlp.c_proj"] == (48, 192)
    assert "Not in linear layers: Embedding" in str(plan) and "Conv1D" not in str(plan)
    quantize(model, what, calibration=[tokens])
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 8
    assert sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}) == plan.bytes_after
    assert all(row.output_sqnr > 10 for row in Quantizer(model).report.layers)
    logits = model(tokens).logits
    assert F.cosine_similarity(logits, exact, dim=-1).min() > (0.999 if scheme == "w8a32" else 0.9)
    assert not Quantizer(model).plan(what).todo  # the rule for Conv1D still finds its layers
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", model=skeleton)(tokens).logits, logits)


def test_a_subclass_of_conv1d_is_left_with_a_reason_and_nan_in_one_is_found():
    conv = conv1d(18, 20)

    class Doubled(type(conv)):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(20, 18), conv)
    odd, plain = Quantizer(model).plan(recipe("w8a32")).layers
    assert odd.scheme is None and "subclass of Conv1D" in odd.reason and plain.scheme is not None
    conv.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="'1' has NaN"):
        quantize(model, recipe("w8a32"))
    assert model[1] is conv
