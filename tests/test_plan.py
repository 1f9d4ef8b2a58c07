"""A recipe against a model: which rule means which layer, and what is wrong before anything is touched."""

import json

import pytest
import torch
from torch import nn

from qgraft import Quantizer, Recipe
from qgraft.quantizer import PlanError


class Attention(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)


class MLP(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Decoder(nn.Module):
    def __init__(self, blocks=2, width=24):
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(width), "mlp": MLP(width)}) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 9, bias=False)


def plan(recipe, model=None):
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict({"min_features": 1, **recipe})
    return Quantizer(model or Decoder()).plan(recipe)


def chosen(recipe, model=None):
    """Name -> scheme, for the layers that will be quantized."""
    return {layer.name: layer.scheme_name for layer in plan(recipe, model).todo}


def problems(yaml, model=None):
    with pytest.raises(PlanError) as caught:
        plan(Recipe.from_yaml("min_features: 1\n" + yaml, "my.yaml"), model)
    return str(caught.value).splitlines()


ALL = [f"layers.{i}.{part}" for i in (0, 1) for part in ("attn.q_proj", "attn.k_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("lm_head", ["lm_head"]),
        ("layers.1.attn.q_proj", ["layers.1.attn.q_proj"]),
        ("*.down_proj", ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]),
        ("layers.0.*", ALL[:4]),
        ("layers.[!0].mlp.*", ALL[6:]),
        ("Linear", [*ALL, "lm_head"]),
        ("*", [*ALL, "lm_head"]),
        (r"re:layers\.\d+\.attn\.[qk]_proj", [n for n in ALL if "attn" in n]),
        (r"re:.*head", ["lm_head"]),
    ],
)
def test_a_rule_means_an_exact_name_a_glob_a_class_or_a_full_regex(pattern, names):
    assert list(chosen({"rules": [{"match": pattern, "scheme": "w8a16"}]})) == names


def test_a_class_name_means_a_subclass_by_its_own_name_only():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(16, 16), Mine(16, 16))
    assert [layer.name for layer in plan({"rules": [{"match": "Mine", "scheme": "w8a32"}]}, model).todo] == ["1"]
    found = plan({"rules": [{"match": "Mine", "skip": "mine"}, {"match": "Linear", "scheme": "w8a32"}]}, model)
    assert [layer.name for layer in found.todo] == ["0"]


def test_the_first_rule_that_matches_wins_and_the_default_takes_the_rest():
    found = plan(
        {
            "scheme": "w8a32",
            "rules": [
                {"match": "layers.0.mlp.*", "scheme": "w8a16"},
                {"match": ["*.mlp.*", "lm_head"], "skip": "for a reason of mine"},
                {"match": "*.down_proj", "scheme": {"name": "w4a4_svd", "rank": 2}},
            ],
        }
    )
    schemes = {layer.name: layer.scheme_name for layer in found.layers}
    assert schemes["layers.0.mlp.down_proj"] == "w8a16" and schemes["layers.0.attn.q_proj"] == "w8a32"
    assert schemes["layers.1.mlp.down_proj"] is None and schemes["lm_head"] is None
    assert [layer.reason for layer in found.layers if layer.scheme is None] == ["for a reason of mine"] * 3


def test_a_rule_reaches_a_shared_module_by_any_of_its_names():
    model = nn.Module()
    model.first = nn.Linear(16, 16)
    model.second = model.first
    assert plan({"rules": [{"match": "second", "scheme": "w8a16"}]}, model).todo[0].names == (
        "first",
        "second",
    )


def test_options_of_a_rule_reach_the_layer():
    recipe = {"rules": [{"match": "lm_head", "scheme": {"name": "w4a4_svd", "rank": 3, "group_size": 16}}]}
    model = Decoder()
    assert plan(recipe, model).todo[0].scheme.rank == 3
    Quantizer(model).quantize(Recipe.from_dict({"min_features": 1, **recipe}))
    assert model.lm_head.proj_up.shape == (9, 3)


def test_without_a_default_scheme_only_the_rules_quantize():
    found = plan({"rules": [{"match": "lm_head", "scheme": "w8a16"}]})
    assert len(found.todo) == 1
    assert {layer.reason for layer in found.layers if not layer.scheme} == {
        "no rule names it, and the recipe has no default scheme"
    }


def test_layers_below_min_features_stay_float_on_either_side():
    model = nn.Sequential(nn.Linear(15, 40), nn.Linear(40, 15), nn.Linear(16, 16))
    found = plan({"scheme": "w8a32", "min_features": 16}, model)
    assert [layer.name for layer in found.todo] == ["2"]
    assert found.layers[0].reason == "smaller than min_features = 16"


# -- problems ----------


def test_a_pattern_without_a_match_names_its_line_and_the_nearest_names():
    (line,) = problems("scheme: w8a32\nrules:\n  - match: ['*.q_proj', '*.dwn_proj']\n    skip: x\n")
    assert line.startswith("my.yaml:4: rules[0].match[1]: '*.dwn_proj' matches no linear layer")
    assert "down_proj'" in line and "optional: true" in line


def test_where_no_name_is_near_the_kinds_of_names_are_listed():
    recipe = Recipe.from_dict({"scheme": "w8a32", "rules": [{"match": "*.zzz", "skip": "x"}]})
    layers = nn.ModuleList(nn.ModuleDict({"key": nn.Linear(8, 8), "query": nn.Linear(8, 8)}) for _ in range(3))
    with pytest.raises(PlanError, match=r"like 'encoder\.\*\.key', 'encoder\.\*\.query' \("):
        Quantizer(nn.ModuleDict({"encoder": layers})).plan(recipe)
    with pytest.raises(PlanError, match="matches no linear layer; the model has none"):
        Quantizer(nn.ReLU()).plan(recipe)


@pytest.mark.parametrize("rank", [1, 2])
def test_an_optional_rule_may_match_nothing(rank):
    rule = {"match": ["nothing.*", "Nobody"], "scheme": {"name": "w4a4_svd", "rank": rank}, "optional": True}
    assert len(chosen({"scheme": "w8a32", "rules": [rule]})) == 9


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        (
            "layers.0.mlp",
            "matches 'layers.0.mlp', a MLP, but no linear layer; for those inside it write 'layers.0.mlp.*'",
        ),
        ("Attention", "matches 'layers.0.attn', a Attention, but no linear layer; for those inside it"),
        ("embed", "matches 'embed', a Embedding, but no linear layer"),
    ],
)
def test_a_pattern_that_means_only_a_container_says_so(pattern, hint):
    (line,) = problems(f"scheme: w8a32\nrules:\n  - match: {pattern}\n    skip: x\n")
    assert hint in line and (("write" in line) == (pattern != "embed"))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w8a17", ["no scheme 'w8a17'", "did you mean 'w8a16'?", "known: "]),
        ("{name: w4a4_svd, rnk: 8}", ["has no option 'rnk'", "did you mean 'rank'?"]),
        ("{name: w8a32, rank: 8}", ["scheme w8a32 has no option 'rank'", "options: none"]),
        ("{name: w4a4_svd, rank: '8'}", ["rank", "valid integer", "'8'"]),
        ("{name: w4a4_svd, rank: true}", ["rank", "valid integer", "True"]),
        ("{name: w4a4_svd, rank: -1}", ["rank", "greater than or equal to 0", "-1"]),
        ("{name: w4a4_svd, group_size: 48}", ["group_size", "16, 32, 64, 128 or 256", "48"]),
        ("{name: w4a4_svd, smooth_alpha: 1.5}", ["smooth_alpha", "less than or equal to 1", "1.5"]),
        ("{name: w4a4_svd, rotate: 1}", ["rotate", "valid boolean"]),
        ("{name: w4a4_svd, rounding: best}", ["rounding", "'gptq'", "'best'"]),
    ],
)
@pytest.mark.parametrize("where", ["default", "rule", "rule that is hidden by others"])
def test_a_wrong_scheme_or_option_is_named_with_its_line(scheme, words, where):
    yaml = {
        "default": f"scheme:\n  {scheme}\n",
        "rule": f"rules:\n  - match: lm_head\n    scheme:\n      {scheme}\n",
        "rule that is hidden by others": (
            f"rules:\n  - match: '*'\n    skip: all\n  - match: lm_head\n    scheme:\n      {scheme}\n"
        ),
    }[where]
    (line,) = problems(yaml)
    written = 1 + next(i for i, text in enumerate(yaml.splitlines(), 1) if scheme in text)
    # A scheme that is a bare name has the line of its own text, an option that of the mapping it stands in.
    assert line.startswith((f"my.yaml:{written}: ", f"my.yaml:{written - 1}: "))
    assert all(word in line for word in words)


def test_a_rank_above_the_shape_skips_under_a_default_and_fails_under_a_rule():
    found = plan({"scheme": {"name": "w4a4_svd", "rank": 10}})
    skipped = [layer for layer in found.layers if layer.scheme is None]
    assert [layer.name for layer in skipped] == ["lm_head"] and "rank <= 9" in skipped[0].reason
    (line,) = problems("rules:\n  - match: '*'\n    scheme: {name: w4a4_svd, rank: 10}\n")
    assert line.startswith("my.yaml:4: rules[0].scheme: layer 'lm_head': rank 10") and "rank <= 9" in line


def test_every_problem_of_a_recipe_is_reported_at_once():
    lines = problems(
        "scheme: {name: w4a4_svd, rank: -3, rotat: true}\n"
        "rules:\n"
        "  - {match: nowhere, scheme: w8a17}\n"
        "  - {match: lm_head, scheme: {name: w4a4_svd, rank: 10}}\n"
        "  - {match: [layers.0.mlp, '*.q_prj'], skip: x}\n"
    )
    for part in (
        "rank: ",
        "'rotat'",
        "'w8a17'",
        "'nowhere'",
        "'lm_head': rank 10",
        "'layers.0.mlp'",
        "'*.q_prj'",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 7 and all(line.startswith("my.yaml:") for line in lines)


def test_a_recipe_built_in_python_is_named_instead_of_a_line():
    with pytest.raises(PlanError, match=r"^recipe 'mine': scheme.name: no scheme 'w9'"):
        plan(Recipe(name="mine", scheme="w9"))


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "w8a32", "rules": [{"match": "nothing", "skip": "x"}]},
        {"scheme": "w8a32", "rules": [{"match": "lm_head", "scheme": {"name": "w4a4_svd", "rank": 300}}]},
        {"scheme": {"name": "w8a32", "rank": 3}},
        {"scheme": "unknown"},
    ],
)
def test_nothing_is_touched_when_the_plan_fails(recipe):
    model = Decoder()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(PlanError):
        Quantizer(model).quantize(Recipe.from_dict({"min_features": 1, **recipe}))
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# -- what it shows ----------


def test_the_table_joins_layers_that_differ_in_numbers_and_shows_all_of_them_on_request():
    found = plan({"scheme": "w8a32"}, Decoder(blocks=4))
    text = str(found)
    assert "layers.{0-3}.attn.q_proj x4" in text and "layers.2.attn" not in text
    assert found.table(every=True).row_count == 17
    assert "17 of 17 linear layers" in text.replace("\n", " ")


def test_the_plan_is_plain_data_for_json():
    data = plan({"scheme": {"name": "w4a4_svd", "rank": 2}, "rules": [{"match": "lm_head", "skip": "head"}]}).to_dict()
    data = json.loads(json.dumps(data))
    head = data["layers"][-1]
    assert head["names"] == ["lm_head"] and head["scheme"] is None and head["reason"] == "head"
    assert data["layers"][0]["scheme"]["rank"] == 2 and data["uncovered"][0]["name"] == "embed.weight"
