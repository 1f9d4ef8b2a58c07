"""torch's own attention modules, whose fused paths read weights and call no layer."""

import warnings

import pytest
import torch
from torch import nn

from qgraft import Quantizer, QuantLinear, Recipe
from qgraft.quantizer import surgery

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
INT8 = Recipe.from_dict({"scheme": "w8a32"})
WIDTH, FEED = 20, 37


@pytest.fixture
def calls(monkeypatch):
    """The layers whose forward is called. Not by hooks: torch leaves its fused path where it sees any."""
    seen = []
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: (seen.append(id(self)), forward(self, x))[1])
    return seen


def encoder(layers=2, **options):
    options = {"dim_feedforward": FEED, "batch_first": True, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # norm_first and odd heads turn nested tensors off
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, **options), layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def padding(batch, tokens):
    lengths = torch.randint(1, tokens, (batch,))
    lengths[0] = tokens
    return torch.arange(tokens) >= lengths[:, None]


def test_out_proj_of_multihead_attention_is_left_and_in_proj_is_no_linear_layer():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 2), "fc": nn.Linear(WIDTH, WIDTH)})
    plan = Quantizer(model).plan(INT8)
    out_proj = next(layer for layer in plan.layers if layer.name == "attention.out_proj")
    assert out_proj.scheme is None and "MultiheadAttention" in out_proj.reason
    assert [u.name for u in plan.uncovered] == ["attention.in_proj_weight"]
    assert "Not in linear layers: MultiheadAttention" in str(plan)
    x = torch.randn(5, 3, WIDTH)
    before = model["attention"](x, x, x)[0]
    Quantizer(model).quantize(INT8)
    assert torch.equal(model["attention"](x, x, x)[0], before) and isinstance(model["fc"], QuantLinear)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_path_of_an_encoder_layer_does_not_bypass_ours(calls, activation, norm_first, dtype):
    model = encoder(1, activation=activation, norm_first=norm_first).layers[0].to(dtype)
    x = torch.randn(3, 7, WIDTH, dtype=dtype)
    with torch.no_grad():
        exact = model(x)
        Quantizer(model).quantize(INT8)
        y = model(x)
    assert calls == [id(model.linear1), id(model.linear2)]
    torch.testing.assert_close(y, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "rules", [[], [{"match": "layers.0.*", "skip": "kept"}], [{"match": "layers.1.*", "skip": "kept"}]]
)
def test_an_encoder_with_padding_calls_every_quantized_layer_and_gives_the_right_tokens(calls, rules):
    """The encoder turns padded input into a nested tensor before it looks at its layers."""
    model = encoder()
    x, mask = torch.randn(4, 9, WIDTH), padding(4, 9)
    with torch.no_grad():
        exact = model(x, src_key_padding_mask=mask)
        Quantizer(model).quantize(Recipe.from_dict({"scheme": "w8a32", "rules": rules}))
        y = model(x, src_key_padding_mask=mask)
    layers = [id(m) for m in model.modules() if isinstance(m, QuantLinear)]
    assert calls == layers and len(layers) == (2 if rules else 4)
    torch.testing.assert_close(y[~mask], exact[~mask], rtol=0.1, atol=0.1)


def test_an_encoder_inside_a_model_is_found_from_its_root(calls):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), encoder(1))
    x = torch.randn(2, 5, WIDTH)
    Quantizer(model).quantize(INT8)
    with torch.no_grad():
        model.eval()(x)
    assert len(calls) == 3


def test_an_encoder_that_keeps_its_linears_keeps_its_fused_path():
    model = nn.ModuleDict({"kept": encoder(), "fc": nn.Linear(WIDTH, WIDTH)})
    rules = [{"match": "kept.*", "skip": "kept"}]
    Quantizer(model).quantize(Recipe.from_dict({"scheme": "w8a32", "rules": rules}))
    assert model["kept"].use_nested_tensor
    assert all(layer.activation_relu_or_gelu for layer in model["kept"].layers)


def test_calibration_sees_the_layers_of_a_fused_encoder_with_padding():
    model = encoder()
    batches = [{"src": torch.randn(2, 6, WIDTH), "src_key_padding_mask": padding(2, 6)} for _ in range(2)]
    recipe = Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 4, "group_size": 16}})
    quantizer = Quantizer(model)
    quantizer.quantize(recipe, calibration=batches)
    assert [row.tokens for row in quantizer.report.layers] == [24] * 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failed_replacement_leaves_the_fused_path_on(monkeypatch):
    model = encoder()

    class Stop(nn.Linear):
        pass

    class Trap(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if key == "linear2" and isinstance(value, Stop):
                raise KeyboardInterrupt

    model.layers[1]._modules = Trap(model.layers[1]._modules)
    old = model.layers[0].linear1
    model.layers[1]._modules["linear2"] = old  # one layer at two places, the second of which fails
    with pytest.raises(KeyboardInterrupt):
        surgery.replace(model, (("layers.0.linear1", "layers.1.linear2"), Stop(WIDTH, FEED)))
    assert model.layers[0].linear1 is old and model.layers[1].linear2 is old
    assert model.use_nested_tensor and all(layer.activation_relu_or_gelu for layer in model.layers)


def test_a_whole_transformer_runs_in_training_and_in_inference(calls):
    model = nn.Transformer(WIDTH, 2, 1, 1, FEED, batch_first=True, dropout=0.0)
    Quantizer(model).quantize(INT8)
    source, target = torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH)
    trained = model(source, target)
    with torch.no_grad():
        inferred = model.eval()(source, target)
    assert len(calls) == 8
    torch.testing.assert_close(trained, inferred, rtol=1e-3, atol=1e-3)
