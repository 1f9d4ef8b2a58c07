"""The low-rank branch as a LoRA adapter that stock peft puts over what is left of the layer."""

import copy
import json

import pytest
import torch
from torch import nn

import qgraft
from qgraft import Quantizer, QuantLinear, Recipe, SVDQW4A8Linear, W4A16Linear
from qgraft.quantizer import CheckpointError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from qgraft.quantizer.interop.peft import split_off_branches  # noqa: E402

W4A16 = {"name": "w4a16", "rotate": False, "rank": 8, "group_size": 32}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def quantized(model, scheme, rules=()):
    skip = {"match": "lm_head", "skip": "head", "optional": True}
    recipe = Recipe.from_dict({"scheme": scheme, "rules": [*rules, skip]})
    ids = torch.randint(0, 64, (4, 32))
    return Quantizer(model).quantize(recipe, calibration=[{"input_ids": ids}], progress=False)


def dequantized(model):
    """The reference: every quantized layer as the float one that multiplies by its weight."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data, linear.bias = layer.dequantize(), layer.bias
            model.set_submodule(name, linear)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_stock_transformers_and_peft_compute_the_same_over_packed_codes(tmp_path):
    pytest.importorskip("compressed_tensors")
    rule = {"match": "*.mlp.*", "scheme": {**W4A16, "rank": 16}}
    model, ids = quantized(llama(), W4A16, [rule]), torch.randint(0, 64, (2, 9))
    base = split_off_branches(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    assert all(layer.scheme.rank == 0 for layer in base.modules() if isinstance(layer, W4A16Linear))
    qgraft.export(base, tmp_path / "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16 and len(config["rank_pattern"]) == 8
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=dense, dtype=torch.float32
    )
    wanted = logits(dequantized(model), ids)
    plain = logits(stock, ids)
    stock = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert (logits(stock, ids) - wanted).abs().max() < 1e-5
    assert (plain - wanted).abs().max() > 1e-3
    merged = stock.merge_and_unload()
    assert (logits(merged, ids) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["w4a8_svd", "w4a4_svd", "w4a16"])
@pytest.mark.parametrize("rotate", [True, False])
def test_over_a_dense_residual_every_layer_with_a_branch_is_its_weight(name, rotate, tmp_path):
    model, ids = quantized(llama(), {"name": name, "rank": 8, "rotate": rotate}), torch.randint(0, 64, (2, 9))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    base = split_off_branches(model, tmp_path / "adapter")
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    stock = llama()
    stock.load_state_dict(dequantized(base).state_dict())
    stock = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert (logits(stock, ids) - logits(dequantized(model), ids)).abs().max() < 1e-5


def test_what_was_no_linear_layer_is_left_as_what_it_was(tmp_path):
    """A 1x1 convolution, and the Conv1D of GPT-2, whose weight lies the other way round."""
    gpt2 = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(gpt2).eval()
    base = split_off_branches(quantized(copy.deepcopy(gpt2), {"name": "w4a16", "rank": 8}), tmp_path / "gpt2")
    base.save_pretrained(tmp_path / "base")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock = peft.PeftModel.from_pretrained(stock, tmp_path / "gpt2").merge_and_unload()
    difference = stock.transformer.h[0].attn.c_proj.weight - gpt2.transformer.h[0].attn.c_proj.weight
    assert difference.norm() < 0.2 * gpt2.transformer.h[0].attn.c_proj.weight.norm()

    x = torch.randn(2, 64, 8, 64)  # rows of as many pixels as there are channels
    for rotate in (True, False):
        model = nn.Sequential(nn.Conv2d(64, 96, 1, stride=2), nn.SiLU(), nn.Conv2d(96, 64, 1))
        recipe = Recipe.from_dict({"scheme": {**W4A16, "rotate": rotate}})
        ours = Quantizer(copy.deepcopy(model)).quantize(recipe, progress=False)
        base = split_off_branches(ours, tmp_path / str(rotate))
        assert base(x).shape == ours(x).shape and isinstance(base[0], nn.Conv2d if rotate else W4A16Linear)
        for i in (0, 2):
            weight = base[i].weight if rotate else base[i].dequantize()[..., None, None]
            model[i].weight.data, model[i].bias = weight.clone(), base[i].bias
        merged = peft.PeftModel.from_pretrained(model, tmp_path / str(rotate)).merge_and_unload()
        for i in (0, 2):
            assert (merged[i].weight[..., 0, 0] - ours[i].dequantize()).abs().max() < 1e-5


def test_a_model_that_has_no_quantized_layer_left_is_saved_as_a_plain_one(tmp_path):
    base = split_off_branches(quantized(llama(), "w4a8_svd"), tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    assert "quantization_config" not in json.loads((tmp_path / "base" / "config.json").read_text())
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(stock.lm_head.weight, base.lm_head.weight)


def test_codes_stay_codes_where_the_residual_is_seen_from_x_as_it_comes(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    for smooth, kind in (("none", SVDQW4A8Linear), ("weights", nn.Linear)):
        recipe = Recipe.from_dict({"scheme": {"name": "w4a8_svd", "rank": 4, "rotate": False, "smooth": smooth}})
        ours = Quantizer(copy.deepcopy(model)).quantize(recipe, progress=False)
        base = split_off_branches(ours, tmp_path / smooth)
        assert type(base[0]) is kind and base[0].bias is not None
        if kind is SVDQW4A8Linear:
            assert torch.equal(base[0].qweight, ours[0].qweight) and base[0].proj_up is None
        with_branch = peft.PeftModel.from_pretrained(dequantized(base), tmp_path / smooth)
        x = torch.randn(5, 64)
        assert (with_branch(x) - dequantized(ours)(x)).abs().max() < 1e-5


def test_a_layer_whose_name_ends_like_that_of_another_gets_no_adapter_of_it(tmp_path):
    model = nn.ModuleDict({"q": nn.Linear(64, 64), "inner": nn.ModuleDict({"q": nn.Linear(64, 64)})})
    rules = [{"match": "inner.q", "skip": "float"}]
    ours = Quantizer(model).quantize(Recipe.from_dict({"scheme": W4A16, "rules": rules}), progress=False)
    base = dequantized(split_off_branches(ours, tmp_path))
    stock = peft.PeftModel.from_pretrained(base, tmp_path)
    with_adapter = {name for name, m in stock.named_modules() if hasattr(m, "lora_A")}
    assert with_adapter == {"base_model.model.q"}


def test_what_has_no_branch_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no layer of the model has a low-rank branch"):
        split_off_branches(quantized(llama(), "w8a16"), tmp_path)
    layer = W4A16Linear.from_linear(nn.Linear(64, 64), rank=4)
    with pytest.raises(CheckpointError, match="a single layer"):
        split_off_branches(layer, tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match="is no empty folder"):
        split_off_branches(quantized(llama(), W4A16), tmp_path)
