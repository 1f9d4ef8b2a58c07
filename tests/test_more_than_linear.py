"""What is quantized besides `nn.Linear`: transformers' Conv1D, embeddings, fused experts."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, QuantLinear, Recipe, load, save
from qgraft.layers import EMBEDDINGS, SCHEMES
from qgraft.quantizer.interop.huggingface import load_quantized

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


# -- embeddings ----------

W8, W4 = "embedding_w8", {"name": "embedding_w4", "group_size": 32}
HEADS = [(W8, "w8a16"), (W8, "w8a32"), (W4, {"name": "w4a16", "group_size": 32})]


class Tokens(nn.Module):
    """A language model in small; a head that is tied to the embedding, or not."""

    def __init__(self, tied=True, words=41, width=51, bias=True):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=3)
        self.position = nn.Embedding(16, width)
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position.weight[: ids.shape[-1]]
        return self.head(torch.relu(self.fc(x)))


def embedding_rule(scheme, match="embed", **more):
    return {"match": match, "scheme": scheme, **more}


def memory(model):
    """Bytes of all parameters and buffers, each memory once."""
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(seen.values())


def is_tied(model):
    return all(model.head._buffers[name] is buffer for name, buffer in model.embed._buffers.items())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "worst"), [("embedding_w8", 0.01), ("embedding_w4", 0.12)])
def test_an_embedding_looks_up_the_rows_of_its_dequantized_weight(name, worst, dtype):
    embedding = nn.Embedding(37, 51, padding_idx=3, dtype=dtype)
    layer = EMBEDDINGS[name].from_embedding(embedding)
    weight = layer.dequantize()
    assert weight.dtype == torch.float32 and layer.padding_idx == 3 and not weight[3].any()
    assert (weight - embedding.weight).norm() < worst * embedding.weight.norm()
    for shape in [(), (7,), (2, 0), (2, 3, 4)]:
        ids = torch.randint(0, 37, shape)
        rows = layer(ids)
        assert rows.dtype == dtype == layer.weight.dtype and rows.shape == (*shape, 51)
        torch.testing.assert_close(rows, weight[ids].to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)
    for wrong in (-1, 37):
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]))
    before = {n: b.clone() for n, b in layer.named_buffers()}
    assert layer.half()(ids).dtype == torch.float16
    assert all(torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in layer.named_buffers())


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_compiles_without_a_break(name):
    layer, ids = EMBEDDINGS[name].from_embedding(nn.Embedding(37, 51)), torch.randint(0, 37, (2, 3))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), layer(ids))


def test_embeddings_that_no_rule_names_stay_and_those_that_one_names_do_not():
    model, ids = Tokens(tied=False), torch.randint(0, 41, (2, 9))
    assert [x.name for x in Quantizer(model).plan(recipe("w8a16", {"match": "*", "scheme": "w8a32"})).todo] == [
        "fc",
        "head",
    ]
    rules = [{"match": "position", "skip": "read through its weight"}, embedding_rule(W8, "Embedding")]
    what = recipe("w8a16", *rules)
    plan = Quantizer(model).plan(what)
    assert {x.name: x.scheme_name for x in plan.layers} == {
        "embed": "embedding_w8", "position": None, "fc": "w8a16", "head": "w8a16",
    }  # fmt: skip
    exact = model(ids)
    quantize(model, what, calibration=[ids])
    assert type(model.embed) is EMBEDDINGS["embedding_w8"] and type(model.position) is nn.Embedding
    assert plan.bytes_after == memory(model)
    assert [row.name for row in Quantizer(model).report.layers] == ["embed", "fc", "head"]
    assert F.cosine_similarity(model(ids), exact, dim=-1).min() > 0.999
    assert not Quantizer(model).plan(what).todo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "head"), HEADS)
def test_a_tied_head_shares_the_codes_of_its_embedding_and_goes_on_to(scheme, head, dtype, tmp_path):
    model, ids = Tokens().to(dtype), torch.randint(0, 41, (2, 9))
    skeleton, exact = copy.deepcopy(model), model(ids)
    what = recipe(head, embedding_rule(scheme))
    plan = Quantizer(model).plan(what)
    assert {x.name: x.codes_of for x in plan.todo} == {"embed": "", "fc": "", "head": "embed"}
    assert "(codes of embed)" in " ".join(str(plan).split()) and 0 < plan.coverage < 1
    bias = model.head.bias
    quantize(model, what)
    assert is_tied(model) and model.head.bias is bias
    assert torch.equal(model.head.dequantize(), model.embed.dequantize())
    logits = model(ids)
    assert F.cosine_similarity(logits, exact, dim=-1).min() > (0.9 if head == HEADS[-1][1] else 0.99)
    again = Quantizer(model).plan(what)
    assert plan.bytes_after == memory(model) == again.bytes_before and again.coverage == plan.coverage
    assert {row.name for row in Quantizer(model).report.layers} == {"embed", "fc", "head"}

    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=skeleton)
    assert torch.equal(loaded(ids), logits) and is_tied(loaded) and loaded.embed.padding_idx == 3
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert stored < plan.bytes_after + 4000  # its header; a second copy of the codes would show
    for twin in (copy.deepcopy(model), loaded):
        assert is_tied(twin) and twin.embed._buffers["qweight"] is not model.embed._buffers["qweight"]
        assert is_tied(twin.half()) and is_tied(twin.to("meta")) and is_tied(twin.to_empty(device="cpu"))


def test_a_saved_tied_model_loads_into_a_skeleton_on_meta_that_is_tied_or_not(tmp_path):
    model, ids = Tokens(), torch.randint(0, 41, (2, 9))
    quantize(model, recipe("w8a16", embedding_rule(W8)))
    save(model, tmp_path / "out")
    for tied in (True, False):
        with torch.device("meta"):
            skeleton = Tokens(tied)
        loaded = load(tmp_path / "out", model=skeleton)
        assert is_tied(loaded) and torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize(
    ("default", "rules", "words"),
    [
        ("w4a16", [embedding_rule(W8)], "scheme w4a16 cannot read its codes: give 'head' the scheme w8a16 or w8a32"),
        ("w8a16", [embedding_rule(W4)], "give 'head' the scheme w4a16 with group_size: 32, rotate: true"),
        ({**HEADS[-1][1], "rounding": "gptq"}, [embedding_rule(W4)], "without zero_point, rank or gptq"),
        ("w8a16", [embedding_rule(W8), {"match": "head", "skip": "an output"}], "in float (an output): give 'head'"),
        (None, [embedding_rule(W8)], "tied to head.weight, which has no scheme"),
        ("w8a16", [{"match": "position", "scheme": "w8a16"}], "a Embedding, but no linear layer (schemes for emb"),
        ("w8a16", [embedding_rule(W8, "fc")], "'fc', a Linear, but no embedding"),
        (W8, [], "'embedding_w8' is for embeddings, which only rules reach"),
    ],
)
def test_what_cannot_be_done_to_an_embedding_is_refused_before_anything_is_touched(default, rules, words):
    model = Tokens()
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(model, recipe(default, *rules))
    assert model.head.weight is model.embed.weight and type(model.fc) is nn.Linear


def test_a_head_that_reads_the_weight_transposed_cannot_share_it():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 30), "head": nn.Linear(30, 30)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data.t())
    with pytest.raises(ValueError, match="only a part of it, or has another shape"):
        Quantizer(model).plan(recipe("w8a16", embedding_rule(W8)))


def test_an_untied_embedding_becomes_a_copy_and_the_head_keeps_its_floats():
    model = Tokens()
    weight = model.head.weight
    plan = Quantizer(model).plan(recipe("w8a16", embedding_rule(W8, untie=True)))
    quantize(model, recipe("w8a16", embedding_rule(W8, untie=True)))
    assert type(model.embed) is EMBEDDINGS["embedding_w8"] and model.head.weight is weight
    assert plan.bytes_after == memory(model) and any("larger" in note for note in plan.notes)


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse", "subclass"])
def test_an_embedding_that_does_more_than_look_up_is_left_with_a_reason(option):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    odd = Scaled(30, 20) if option == "subclass" else nn.Embedding(30, 20, **{option: True})
    model = nn.Sequential(odd, nn.Linear(20, 20))
    layer = Quantizer(model).plan(recipe("w8a16", embedding_rule(W8, "0"))).layers[0]
    assert layer.scheme is None and option in layer.reason
    quantize(model, recipe("w8a16", embedding_rule(W8, "0")))
    assert model[0] is odd


def test_an_interrupt_leaves_embedding_and_head_both_as_they_were(monkeypatch):
    model = Tokens()
    embed, head = model.embed, model.head

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qgraft.quantizer.graft.tied_head", interrupt)
    with pytest.raises(KeyboardInterrupt, match="'embed'"):
        quantize(model, recipe("w8a16", embedding_rule(W8)))
    assert model.embed is embed and model.head is head and head.weight is embed.weight
    monkeypatch.undo()
    quantize(model, recipe("w8a16", embedding_rule(W8)))
    assert is_tied(model)


def test_a_hugging_face_model_with_a_tied_head_comes_back_tied_from_its_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 64, (2, 9))
    exact = model(ids).logits
    quantize(model, recipe("w8a32", {"match": "Embedding", "scheme": W8}))
    logits = model(ids).logits
    assert F.cosine_similarity(logits, exact, dim=-1).min() > 0.999
    assert model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (2, 12)
    save(model, tmp_path / "out")
    loaded, _ = load_quantized(tmp_path / "out")
    assert loaded.lm_head.qweight is loaded.model.embed_tokens.qweight and torch.equal(loaded(ids).logits, logits)
