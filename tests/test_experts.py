"""Fused experts of mixture models: split into linear layers, each quantized, against the float model."""

import copy
import warnings

import pytest
import torch
from torch import nn

from qgraft import Quantizer, QuantLinear, Recipe, load, save
from qgraft.layers import Experts, is_fused, why_not_split
from qgraft.quantizer.errors import CalibrationError, CheckpointError
from qgraft.quantizer.surgery import find_sites, split_experts

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers.integrations import moe  # noqa: E402

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
# Concatenated halves; with a dense layer beside them; transposed, interleaved, clamped and with biases.
MODELS = {
    "Mixtral": {"num_local_experts": 5},
    "Qwen3Moe": {"num_experts": 5, "decoder_sparse_step": 1},
    "Qwen2Moe": {"num_experts": 5, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 24},
    "GptOss": {"num_local_experts": 5, "layer_types": ["full_attention"] * 2},
}
SCHEME = {"name": "w4a4_svd", "rank": 4, "group_size": 16}


def build(kind, **more):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MODELS[kind], **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.ndim > 1 else 1)
    return model


def recipe(scheme, *rules):
    return Recipe.from_dict({"scheme": scheme, "rules": list(rules), "min_features": 1})


def quantize(model, what, **kw):
    return Quantizer(model).quantize(what, progress=False, **kw)


def fused_modules(model):
    return {name: m for name, m in model.named_modules() if is_fused(m)}


def tokens():
    return torch.randint(0, 50, (2, 11))


@moe.use_experts_implementation(has_gate=False)
class Ungated(nn.Module):
    """As Nemotron has them: one projection up, an activation, one down."""

    def __init__(self, config, experts=3, hidden=18, inner=22):
        super().__init__()
        self.num_experts, self.act_fn = experts, nn.ReLU()
        self.up_proj = nn.Parameter(torch.randn(experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("the decorator runs another one")


def ungated(**kw):
    module = Ungated(transformers.MixtralConfig(), **kw)
    module.config._experts_implementation = "batched_mm"
    return module


def routed(count=7, k=2, experts=3, hidden=18):
    return torch.randn(count, hidden), torch.rand(count, experts).topk(k).indices, torch.rand(count, k)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_experts_compute_what_the_fused_ones_did(kind, dtype):
    model, ids = build(kind).to(dtype), tokens()
    with torch.no_grad():
        exact = model(ids).logits
        names = [site.name for site in find_sites(model) if site.fused is not None]
        assert len(names) == 2 * 5 * 2 and len(fused_modules(model)) == 2
        before = sum(p.numel() for p in model.parameters())
        assert split_experts(model, names) is model and not fused_modules(model)
        assert all(type(model.get_submodule(name)) is nn.Linear for name in names)
        assert sum(p.numel() for p in model.parameters()) == before
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        off = (model(ids).logits - exact).float().abs() / exact.float().abs().max()
        # Rounded to bfloat16, a token between two experts may go to the other one: then it is another token.
        assert off.median() < tolerance
        assert off.max() < tolerance or dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MODELS)
def test_quantized_experts_compute_what_their_dequantized_weights_say(kind, tmp_path):
    model, ids = build(kind), tokens()
    oracle, skeleton = copy.deepcopy(model), copy.deepcopy(model)
    what = recipe("w8a32")
    plan = Quantizer(model).plan(what)
    assert all(is_fused(m) for m in fused_modules(model).values()) and len(fused_modules(model)) == 2
    quantize(model, what)
    assert not fused_modules(model) and sum(isinstance(m, Experts) for m in model.modules()) == 2
    assert plan.coverage > 0.8 and not any("3-D" in note for note in plan.notes)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and ".experts." not in name:
            oracle.get_submodule(name).weight.data = layer.dequantize()
    for name, fused in fused_modules(oracle).items():
        for leaf, layer in model.get_submodule(name).projections():
            index, _, projection = leaf.partition(".")
            weight = layer.dequantize()
            fused._parameters[projection].data[int(index)] = weight.t() if fused.is_transposed else weight
    logits = model(ids).logits
    exact = oracle(ids).logits
    torch.testing.assert_close(logits, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
    tensors = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sum(tensors.values()) == plan.bytes_after
    again = Quantizer(model).plan(what)
    assert not again.todo and again.coverage == pytest.approx(plan.coverage)
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", model=skeleton)(ids).logits, logits)


@pytest.mark.parametrize("scheme", ["w8a32", "w4a16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (7, 3), (0, 2)])
def test_ungated_experts_any_number_of_tokens_and_gradients(scheme, shape):
    fused, (x, index, weights) = ungated(), routed(*shape)
    exact = fused(x, index, weights)
    quantized = quantize(fused, recipe(scheme))
    assert isinstance(quantized, Experts) and fused.up_proj is not None
    layers = {name: layer.dequantize() for name, layer in quantized.projections()}
    for name, weight in layers.items():
        position, _, projection = name.partition(".")
        fused._parameters[projection].data[int(position)] = weight
    x, twin = x.requires_grad_(), x.detach().clone().requires_grad_()
    y, oracle = quantized(x, index, weights), fused(twin, index, weights)
    tolerance = 1e-4 if scheme == "w8a32" else 0.05  # w4a16 rounds activations to bfloat16
    torch.testing.assert_close(y, oracle, rtol=tolerance, atol=tolerance * (1 + oracle.abs().sum().item() / 20))
    assert y.shape == exact.shape
    if len(x) and scheme == "w8a32":
        torch.autograd.backward([y.sum(), oracle.sum()])
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-3, atol=1e-3 * twin.grad.abs().max().item())


def test_rules_reach_experts_by_name_and_by_the_class_of_their_module_before_and_after():
    model = build("Mixtral")
    rules = [
        {"match": "*.experts.*.down_proj", "scheme": "w8a16"},
        {"match": "model.layers.1.mlp.experts.3.gate_up_proj", "skip": "this one"},
        {"match": "MixtralExperts", "scheme": SCHEME},
        {"match": "*", "skip": "not now"},
    ]
    what = recipe("w8a32", *rules)
    chosen = {x.name: x.scheme_name for x in Quantizer(model).plan(what).layers if ".experts." in x.name}
    assert chosen["model.layers.0.mlp.experts.4.down_proj"] == "w8a16" and len(chosen) == 20
    assert chosen["model.layers.0.mlp.experts.4.gate_up_proj"] == "w4a4_svd"
    assert chosen["model.layers.1.mlp.experts.3.gate_up_proj"] is None
    assert "x10" in str(Quantizer(model).plan(what))
    quantize(model, what)
    left = model.model.layers[1].mlp.experts.get_submodule("3.gate_up_proj")
    assert type(left) is nn.Linear and model(tokens()).logits.isfinite().all()
    assert not Quantizer(model).plan(what).todo
    assert [x.name for x in Quantizer(model).plan(recipe("w8a32", *rules[2:3])).todo if ".experts." in x.name] == [
        "model.layers.1.mlp.experts.3.gate_up_proj"
    ]


def test_a_recipe_that_leaves_the_experts_does_not_split_them():
    model = build("Mixtral")
    quantize(model, recipe("w8a32", {"match": "MixtralExperts", "skip": "not these"}))
    assert len(fused_modules(model)) == 2 and any(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("scheme", [SCHEME, {"name": "w4a16", "rounding": "gptq"}])
def test_an_expert_that_the_calibration_never_reaches_is_told(scheme):
    model, ids = build("Mixtral", num_hidden_layers=1), torch.randint(0, 50, (1, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if scheme == SCHEME:
            quantize(model, recipe(scheme), calibration=[ids])
            assert any("did not reach model.layers.0.mlp.experts." in str(w.message) for w in caught)
            reports = {row.name: row.tokens for row in Quantizer(model).report.layers if ".experts." in row.name}
            assert len(reports) == 10 and sum(reports.values()) == 2 * 2 * 2 and 0 in reports.values()
        else:
            with pytest.raises(CalibrationError, match=r"experts\..*does not reach it, and rounding: gptq needs"):
                quantize(model, recipe(scheme), calibration=[ids])
            assert model(ids).logits.isfinite().all()


def test_meta_nan_copies_and_an_interrupt():
    with torch.device("meta"):
        meta = build("Mixtral")
    model = build("Mixtral")
    plans = [Quantizer(m).plan(recipe("w8a32")) for m in (meta, model)]
    assert plans[0].bytes_after == plans[1].bytes_after and plans[0].layers == plans[1].layers
    copied = Quantizer(model).quantize(recipe("w8a32"), inplace=False, progress=False)
    assert len(fused_modules(model)) == 2 and not fused_modules(copied)
    assert torch.equal(copy.deepcopy(copied)(ids := tokens()).logits, copied(ids).logits)
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.experts.2.down_proj' has NaN"):
        quantize(model, recipe("w8a32"))
    assert len(fused_modules(model)) == 2


def test_a_checkpoint_with_experts_does_not_load_into_a_model_without_and_leaves_it_as_it_was(tmp_path):
    save(quantize(build("Mixtral"), recipe("w8a32")), tmp_path / "out")
    other = build("Mixtral")
    other.model.layers[0].mlp.experts = nn.Linear(3, 3)
    experts = other.model.layers[1].mlp.experts
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.experts' was split .* from a MixtralExperts"):
        load(tmp_path / "out", model=other)
    wrong = build("Mixtral", num_local_experts=4)
    with pytest.raises(CheckpointError, match=r"no layer .model.layers.0.mlp.experts.4"):
        load(tmp_path / "out", model=wrong)
    assert other.model.layers[1].mlp.experts is experts and len(fused_modules(wrong)) == 2


def unequal():
    module = ungated()
    module.down_proj = nn.Parameter(torch.randn(4, 18, 22))
    return module


def extra():
    module = ungated()
    module.scale = nn.Parameter(torch.randn(3, 22, 18))
    return module


def spread():
    module = ungated()
    module._is_expert_parallel = True
    return module


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 18, 22))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (unequal, "disagree about the number of experts, 3: up_proj 3, down_proj 4"),
        (extra, "its parameters are down_proj, scale, up_proj instead of"),
        (spread, "spread over several devices"),
        (Own, "no linear layers"),
    ],
)
def test_experts_that_cannot_be_split_stay_and_the_plan_says_why(make, why):
    odd = make()
    model = nn.Sequential(nn.Linear(18, 18), odd)
    plan = Quantizer(model).plan(recipe("w8a32"))
    (note,) = (note for note in plan.notes if "3-D" in note)
    assert why in note and "% of the weights and stay as they are" in note
    assert not is_fused(odd) or why in why_not_split(odd)
    quantize(model, recipe("w8a32"))
    assert model[1] is odd
