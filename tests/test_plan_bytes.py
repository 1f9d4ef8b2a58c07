"""Bytes before and after, tied weights, and what no rule can reach: the plan against the model afterwards."""

import pytest
import torch
from torch import nn

from qgraft import Quantizer, QuantLinear, Recipe
from qgraft.quantizer.surgery import find_sites

SVD = {"name": "w4a4_svd", "rank": 4, "group_size": 16}


def real_bytes(model):
    """Memory of all parameters and buffers, each once, however many names and objects share it."""
    memory = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(memory.values())


class Tied(nn.Module):
    def __init__(self, words=40, width=24, bias=False):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.fc = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, words, bias=bias)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.lm_head(torch.relu(self.fc(self.embed(tokens))))


class SharedBias(nn.Module):
    """As BERT has it: the bias of the head is a parameter of its parent too."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(20, 33)
        self.other = nn.Linear(20, 33)
        self.bias = self.decoder.bias
        self.other.bias = self.decoder.bias


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(21, 34), nn.ReLU(), nn.Linear(34, 21, bias=False))
        self.a, self.b, self.norm = block, block, nn.BatchNorm1d(21)


class TwoTiedLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 32), nn.Linear(24, 32, bias=False)
        self.b.weight = self.a.weight


class TiedByMemory(nn.Module):
    """Two Parameter objects over one memory."""

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(30, 24), nn.Linear(24, 30)
        self.lm_head.weight.data = self.embed.weight.data


MODELS = [
    Tied,
    lambda: Tied(bias=True),
    SharedBias,
    Shared,
    TwoTiedLinears,
    TiedByMemory,
    lambda: nn.Linear(33, 47),
]
RECIPES = {
    "w8a32": {"scheme": "w8a32"},
    "w8a16": {"scheme": "w8a16"},
    "svd": {"scheme": SVD},
    "untie": {"rules": [{"match": "*", "scheme": "w8a32", "untie": True}]},
    "untie svd": {"rules": [{"match": "*", "scheme": SVD, "untie": True}]},
}


@pytest.mark.filterwarnings("ignore:.*no layer is left")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planned_bytes_are_the_real_ones_and_the_report_adds_up_to_them(make, recipe, dtype):
    model, recipe = make().to(dtype), Recipe.from_dict(recipe)
    quantizer = Quantizer(model)
    plan = quantizer.plan(recipe)
    before = real_bytes(model)
    assert plan.bytes_before == before
    result = quantizer.quantize(recipe, progress=False)
    assert plan.bytes_after == real_bytes(result) == quantizer.plan(recipe).bytes_before
    rows = quantizer.report.layers
    assert len(rows) == len(plan.todo)
    assert plan.bytes_after == before + sum(row.bytes_after - row.bytes_before for row in rows)
    for row in rows:
        layer = result.get_submodule(row.name)
        assert row.bytes_after == sum(t.nbytes for t in (*layer.buffers(), *layer.parameters()))


# -- tied weights ----------


def test_a_tied_head_is_left_and_the_reason_names_the_other_owner():
    model = Tied()
    plan = Quantizer(model).plan(Recipe.from_dict({"scheme": "w8a32"}))
    head = plan.layers[-1]
    assert head.name == "lm_head" and head.scheme is None
    assert "tied to embed.weight" in head.reason and "untie: true" in head.reason
    Quantizer(model).quantize(Recipe.from_dict({"scheme": "w8a32"}))
    assert model.lm_head.weight is model.embed.weight and isinstance(model.fc, QuantLinear)


def test_a_rule_alone_does_not_untie():
    rule = {"match": "lm_head", "scheme": "w8a32"}
    plan = Quantizer(Tied()).plan(Recipe.from_dict({"rules": [rule]}))
    assert not plan.todo and "tied" in plan.layers[-1].reason


def test_untying_quantizes_a_copy_and_the_plan_says_how_much_the_model_grows():
    model = Tied(words=2000, width=64)
    recipe = Recipe.from_dict({"rules": [{"match": "lm_head", "scheme": "w8a32", "untie": True}]})
    plan, before = Quantizer(model).plan(recipe), real_bytes(model)
    embedding = model.embed.weight
    # 2000 x 64 codes and 2000 float32 scales
    assert plan.bytes_after - plan.bytes_before == 2000 * 64 + 2000 * 4
    assert any("132.8 KiB larger" in note for note in plan.notes) and "132.8 KiB larger" in str(plan)
    assert "(untied)" in str(plan)
    Quantizer(model).quantize(recipe)
    assert real_bytes(model) - before == 2000 * 64 + 2000 * 4
    assert model.embed.weight is embedding and isinstance(model.lm_head, QuantLinear)


@pytest.mark.parametrize("head_first", [False, True])
def test_an_untied_head_counts_as_a_weight_of_its_own_in_the_coverage(head_first):
    model = Tied(words=500, width=32)
    if head_first:
        model._modules = dict(sorted(model._modules.items(), reverse=True))
    recipe = Recipe.from_dict({"rules": [{"match": "lm_head", "scheme": "w8a32", "untie": True}]})
    plan = Quantizer(model).plan(recipe)
    assert 0.45 < plan.coverage < 0.5  # one of two copies, and the small fc
    assert [u.name for u in plan.uncovered] == ["embed.weight"]
    Quantizer(model).quantize(recipe)
    assert Quantizer(model).plan(recipe).coverage == pytest.approx(plan.coverage, abs=1e-3)


def test_a_weight_whose_owners_are_all_quantized_is_freed_and_nothing_is_said_to_grow():
    plan = Quantizer(TwoTiedLinears()).plan(Recipe.from_dict(RECIPES["untie"]))
    assert len(plan.todo) == 2 and plan.bytes_after < plan.bytes_before and not plan.notes


def test_one_of_two_tied_linears_can_be_untied_alone():
    model = TwoTiedLinears()
    rules = [{"match": "b", "scheme": "w8a32", "untie": True}]
    plan = Quantizer(model).plan(Recipe.from_dict({"scheme": "w8a32", "rules": rules}))
    assert [layer.name for layer in plan.todo] == ["b"] and plan.bytes_after > plan.bytes_before
    assert "tied to b.weight" in plan.layers[0].reason
    assert any("larger" in note for note in plan.notes)


def test_a_transposed_view_counts_as_tied():
    model = nn.ModuleDict({"encode": nn.Linear(20, 30), "decode": nn.Linear(30, 20)})
    model["decode"].weight = nn.Parameter(model["encode"].weight.data.t())
    assert [site.tied for site in find_sites(model)] == [("decode.weight",), ("encode.weight",)]


def test_tied_weights_are_seen_on_meta_too():
    with torch.device("meta"):
        model = Tied()
    plan = Quantizer(model).plan(Recipe.from_dict({"scheme": "w8a32"}))
    assert [layer.name for layer in plan.todo] == ["fc"]


def test_layers_that_their_scheme_makes_larger_are_announced():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(256, 256)).half()
    plan = Quantizer(model).plan(Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 16}}))
    assert plan.todo[0].bytes_after > plan.todo[0].bytes_before
    assert plan.notes[0].startswith("larger afterwards, 1 in all: 0;")


# -- out of reach ----------


def test_fused_parameters_of_an_unknown_form_are_reported_as_not_covered_with_their_share():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(32, 3)
            self.up, self.down = nn.Parameter(torch.randn(3, 48, 32)), nn.Parameter(torch.randn(3, 32, 48))

        def forward(self, x):
            y = torch.relu(torch.einsum("tk,enk->ten", x, self.up))
            return torch.einsum("te,ten,ekn->tk", self.router(x).softmax(-1), y, self.down)

    model = nn.Sequential(Mixture(), Mixture())
    experts, total = 4 * 3 * 48 * 32, sum(p.numel() for p in model.parameters())
    recipe = Recipe.from_dict({"scheme": "w8a32", "min_features": 1})
    plan = Quantizer(model).plan(recipe)
    note = next(n for n in plan.notes if "3-D" in n)
    assert note.startswith("4 fused 3-D parameters (0.up, ...) hold")
    assert f" {100 * experts / total:.1f} % of the weights" in note
    assert "Not in linear layers: Mixture" in str(plan)
    assert plan.coverage < 1 - experts / total
    x = torch.randn(7, 32)
    with torch.no_grad():
        exact = model(x)
        y = Quantizer(model).quantize(recipe, progress=False)(x)
    assert plan.bytes_after == real_bytes(model)
    torch.testing.assert_close(y, exact, rtol=0.1, atol=0.05 * exact.abs().max().item())


def test_convolutions_and_embeddings_are_no_experts():
    model = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Embedding(9, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    model.position = nn.Parameter(torch.zeros(1, 7, 16))
    plan = Quantizer(model).plan(Recipe.from_dict({"scheme": "w8a32"}))
    assert not any("3-D" in note for note in plan.notes)
    assert sorted(u.name for u in plan.uncovered) == ["0.weight", "1.weight", "position"]
    weights = sum(p.numel() for p in model.parameters())
    assert plan.total_weights == weights and plan.coverage == 256 / weights


@pytest.mark.parametrize("tie", [True, False])
def test_a_language_model_that_ties_its_head_runs_after_any_of_it(tie):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    plan = Quantizer(model).plan(Recipe.from_dict({"scheme": "w8a32"}))
    assert ("lm_head" in [layer.name for layer in plan.todo]) != tie
    Quantizer(model).quantize("w8a32", progress=False)
    assert isinstance(model.lm_head, QuantLinear) != tie
    assert model(torch.randint(0, 64, (1, 5))).logits.isfinite().all()
