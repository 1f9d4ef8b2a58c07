"""LoRA through peft on top of every kind of quantized layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, QuantLinear, Recipe
from qgraft.layers import SCHEMES

peft = pytest.importorskip("peft")
from qgraft.quantizer.interop.peft import LoraQuantLinear, on_quantized  # noqa: E402

WIDTH = 32
OPTIONS = {"w4a4_svd": {"rank": 4}, "w4a8_svd": {"rank": 4}, "factorized": {"rank": 8}, "factorized_w8": {"rank": 8}}
# Rounded activations: the gradient to x passes them straight through, as if they had not been.
TOLERANCE = {"w8a32": 1e-4, "factorized": 1e-4}


def quantized(scheme, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(WIDTH, 48), nn.Tanh(), nn.Linear(48, WIDTH, bias=False)).to(dtype)
    recipe = Recipe.from_dict({"scheme": {"name": scheme, **OPTIONS.get(scheme, {})}, "min_features": 1})
    data = [torch.randn(64, WIDTH, dtype=dtype) for _ in range(2)]
    return Quantizer(model).quantize(recipe, calibration=data, progress=False)


def with_lora(model, **options):
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **options})
    return peft.get_peft_model(model, on_quantized(config))


def trained_a_little(model):
    """Adapters that do something: peft begins with B = 0."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def test_every_scheme_is_tested_here():
    assert {"w8a16", "w4a4_svd", "bitnet", "factorized"} <= set(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_to_x_and_to_the_adapter_are_those_of_the_dequantized_layer(scheme, dtype):
    model = trained_a_little(with_lora(quantized(scheme, dtype)))
    layer = model.base_model.model[0]
    assert type(layer) is LoraQuantLinear and isinstance(layer.base_layer, SCHEMES[scheme])
    assert not layer.base_layer.bias.requires_grad
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, g = torch.randn(5, WIDTH, dtype=dtype, requires_grad=True), torch.randn(5, 48, dtype=dtype)
    (layer(x) * g).sum().backward()
    weight = layer.base_layer.dequantize().double() + layer.scaling["default"] * b.double() @ a.double()
    wanted = {
        x: g.double() @ weight,
        a: layer.scaling["default"] * (g.double() @ b.double()).t() @ x.double(),
        b: layer.scaling["default"] * g.double().t() @ (x.double() @ a.double().t()),
    }
    tolerance = 2e-2 if dtype == torch.bfloat16 or scheme not in TOLERANCE else TOLERANCE[scheme]
    for tensor, exact in wanted.items():
        assert (tensor.grad.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_learns_is_saved_loaded_and_taken_off_again(scheme, tmp_path):
    base = quantized(scheme)
    codes = {name: t.clone() for name, t in base.state_dict().items()}
    x = torch.randn(128, WIDTH)
    with torch.no_grad():
        plain = base(x)
        target = plain + torch.tanh(x @ torch.randn(WIDTH, 3)) @ torch.randn(3, WIDTH)
    model = with_lora(copy.deepcopy(base))
    assert torch.equal(model(x), plain)  # B is zero
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer, losses = torch.optim.Adam(trained, lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    y = model(x)
    model.save_pretrained(tmp_path)
    config = on_quantized(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config)
    assert torch.equal(loaded(x), y) and not torch.allclose(y, plain, atol=0.1)
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), plain)
    off = loaded.unload()
    assert torch.equal(off(x), plain)
    assert all(torch.equal(t, codes[name]) for name, t in off.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_is_refused_with_a_reason_and_changes_nothing(scheme):
    model, x = trained_a_little(with_lora(quantized(scheme))), torch.randn(5, WIDTH)
    y = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=f"cannot be merged into {SCHEMES[scheme].__name__}: .* beside the quant"):
            merge()
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": "all-linear"}, "would pass the quantized ones by"),
        ({"init_lora_weights": "pissa"}, "'pissa' takes a part out of the float weight"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"use_dora": True}, "use_dora: needs the float weight"),
    ],
)
def test_what_needs_the_float_weight_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        with_lora(quantized("w8a32"), **options)


def test_on_a_quantized_convolution_there_is_no_lora():
    """Its rows of pixels would be taken for features, where there are as many."""
    model = Quantizer(nn.Sequential(nn.Conv2d(WIDTH, 48, 1))).quantize("w8a32", progress=False)
    with pytest.raises(ValueError, match="is a 1x1 convolution, and LoRA on quantized ones is not there"):
        with_lora(model, target_modules=["0"])


def test_peft_alone_refuses_a_quantized_layer_and_does_not_pass_it_by():
    with pytest.raises(ValueError, match="W8A32Linear"):
        peft.get_peft_model(quantized("w8a32"), peft.LoraConfig(target_modules=["0"]))


def test_float_and_quantized_layers_of_a_language_model_train_side_by_side(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rules = [{"match": "*.v_proj", "skip": "float"}, {"match": "Embedding", "scheme": "embedding_w8"}]
    recipe = Recipe.from_dict({"scheme": "w8a32", "rules": rules, "min_features": 1})
    model = Quantizer(model).quantize(recipe, progress=False)
    assert model.lm_head.qweight is model.model.embed_tokens.qweight
    model = peft.get_peft_model(
        model, on_quantized(peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    )
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    attention = model.base_model.model.model.layers[0].self_attn
    assert type(attention.q_proj) is LoraQuantLinear and type(attention.v_proj) is peft.tuners.lora.layer.Linear
    ids = torch.randint(0, 64, (4, 12))
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.98 * losses[0]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    assert any(isinstance(m, QuantLinear) for m in model.modules())
