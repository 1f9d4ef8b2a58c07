"""BitNet layers and models to transformers and back, against transformers' own layers."""

import pytest
import torch

from qgraft import BitLinear, BitNetLinear, Quantizer, Recipe
from qgraft.quantizer.interop import bitnet

# Theirs multiplies by 127 / absmax where ours divides by absmax / 127: a tie now and then is rounded the other way.
TIES = 5e-3


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def eager():
    """Its functions are compiled, which takes longer than these tests."""
    pytest.importorskip("transformers.integrations.bitnet")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k, n", [(77, 48), (5, 4)])
def test_stock_layers_of_both_conventions_compute_the_same_and_come_back(eager, k, n, bias):
    from transformers.integrations.bitnet import AutoBitLinear, unpack_weights
    from transformers.integrations.bitnet import BitLinear as StockBitLinear

    layer, x = BitLinear(k, n, bias=bias).pack(), torch.randn(3, 6, k)
    stock = StockBitLinear(k, n, bias, dtype=torch.float32)
    stock.load_state_dict(bitnet.export_layer(layer, "bitlinear"))
    assert relative(stock(x), layer(x)) < TIES
    tensors = bitnet.export_layer(layer, "autobitlinear")
    auto = AutoBitLinear(k, n, bias)
    auto.load_state_dict(tensors | {"weight": unpack_weights(tensors["weight"], torch.float32)})
    assert relative(auto(x), layer(x)) < TIES
    for convention in bitnet.LINEAR_CLASSES:
        again = bitnet.import_layer(bitnet.export_layer(layer, convention), convention)
        assert torch.equal(again.qweight, layer.qweight)
        assert relative(again(x), layer(x)) < TIES
    for module in (stock, auto):
        again = bitnet.from_transformers(torch.nn.Sequential(module))[0]
        assert torch.equal(again.qweight, layer.qweight)
        assert relative(again(x), layer(x)) < TIES


def test_a_layer_that_quantizes_online_becomes_ternary_for_good(eager):
    from transformers.integrations.bitnet import AutoBitLinear

    model, x = torch.nn.Sequential(AutoBitLinear(64, 32, online_quant=True)), torch.randn(5, 64)
    y = model(x)
    assert relative(bitnet.from_transformers(model)(x), y) < TIES


@pytest.mark.parametrize("convention", ["bitlinear", "autobitlinear"])
def test_a_model_goes_to_from_pretrained_and_back(eager, tmp_path, convention):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    Quantizer(model).quantize("bitnet", progress=False)
    tokens = torch.randint(0, 99, (2, 9))
    bitnet.to_transformers(model, tmp_path / "out", convention)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(stock.model.layers[1].mlp.up_proj).__module__ == "transformers.integrations.bitnet"
    with torch.no_grad():
        expected = model(tokens).logits
        assert relative(stock(tokens).logits, expected) < TIES
        ours = bitnet.from_transformers(stock)
        assert isinstance(ours.model.layers[1].mlp.up_proj, BitNetLinear)
        assert relative(ours(tokens).logits, expected) < TIES


def test_what_the_layout_of_transformers_cannot_say_is_refused(tmp_path):
    pytest.importorskip("transformers.integrations.bitnet")
    with pytest.raises(ValueError, match="6 rows are no multiple of 4"):
        bitnet.export_layer(BitLinear(8, 6).pack())
    with pytest.raises(ValueError, match="one for each of several groups"):
        bitnet.export_layer(BitLinear(8, 8, groups=2).pack())
    with pytest.raises(ValueError, match="linear_class must be one of bitlinear, autobitlinear, got 'linear'"):
        bitnet.export_layer(BitLinear(8, 8).pack(), "linear")
    with pytest.raises(ValueError, match="no BitNet layer"):
        bitnet.from_transformers(torch.nn.Sequential(BitLinear(8, 8)))
    with pytest.raises(ValueError, match="only bitnet layers can be written so, and the model has none"):
        bitnet.to_transformers(torch.nn.Linear(8, 8), tmp_path)
    model = torch.nn.Sequential(torch.nn.Embedding(32, 32), BitLinear(32, 32).pack())
    recipe = Recipe.from_dict({"scheme": "bitnet", "rules": [{"match": "Embedding", "scheme": "embedding_w8"}]})
    with pytest.raises(ValueError, match="only bitnet layers can be written so, and the model has embedding_w8"):
        bitnet.to_transformers(Quantizer(model).quantize(recipe, progress=False), tmp_path)
    tensors = bitnet.export_layer(BitLinear(8, 8, bias=True).pack())
    for broken, message in (
        ({"weight": tensors["weight"] | 0b11}, "ternary codes are -1, 0 and 1"),
        ({"weight": tensors["weight"].float()}, "weight must be uint8"),
        ({"weight_scale": torch.zeros(1)}, "one positive number"),
        ({"weight_scale": torch.ones(2)}, "one positive number"),
        ({"bias": torch.ones(7)}, r"bias must have shape \(8,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bitnet.import_layer(tensors | broken, "bitlinear")
    with pytest.raises(ValueError, match="missing: weight_scale"):
        bitnet.import_layer({"weight": tensors["weight"]}, "bitlinear")
