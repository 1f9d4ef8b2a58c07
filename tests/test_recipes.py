"""Recipes: what they may say, how they are told wrong, and that they come back from YAML as they were."""

import copy
import pickle
from enum import Enum

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qgraft.recipes import CalibrationSpec, Recipe, RecipeError, Rule, SchemeSpec

FULL = """\
# a comment on the first line
name: mine
description: all keys at once
version: 1
scheme: {name: w4a4_svd, rank: 64}
rules:
  - match: "*.down_proj"
    scheme:
      name: w4a4_svd
      rank: 128
  - match: [lm_head, Linear]
    skip: output head
    optional: true
  - {match: embed, scheme: w8a16, untie: true}
calibration:
  samples: 4
min_features: 32
"""


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, "my.yaml")
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return list(caught.value.problems)


def test_a_recipe_with_all_keys_is_read_as_written():
    assert Recipe.from_yaml(FULL) == Recipe(
        name="mine",
        description="all keys at once",
        scheme=SchemeSpec(name="w4a4_svd", options={"rank": 64}),
        rules=(
            Rule(match=("*.down_proj",), scheme=SchemeSpec(name="w4a4_svd", options={"rank": 128})),
            Rule(match=("lm_head", "Linear"), skip="output head", optional=True),
            Rule(match=("embed",), scheme=SchemeSpec(name="w8a16"), untie=True),
        ),
        calibration=CalibrationSpec(samples=4, tokens=512),
        min_features=32,
    )


def test_the_shortest_recipe_is_a_scheme():
    recipe = Recipe.from_yaml("scheme: w8a16")
    assert recipe == Recipe(scheme="w8a16") == Recipe.from_dict({"scheme": {"name": "w8a16"}})
    assert (recipe.rules, recipe.calibration, recipe.min_features) == ((), CalibrationSpec(), 16)
    assert (recipe.calibration.samples, recipe.calibration.tokens) == (128, 512)


def test_a_recipe_may_quantize_by_rules_alone():
    recipe = Recipe.from_yaml("rules: [{match: a, scheme: w8a16}]")
    assert recipe.scheme is None and recipe.rules[0].scheme == SchemeSpec(name="w8a16")


def test_where_points_to_the_line_of_a_value():
    recipe = Recipe.from_yaml(FULL, "my.yaml")
    lines = {
        ("name",): 2,
        ("scheme",): 5,
        ("scheme", "rank"): 5,
        ("rules", 0): 7,
        ("rules", 0, "scheme"): 8,
        ("rules", 0, "scheme", "name"): 9,
        ("rules", 0, "scheme", "rank"): 10,
        ("rules", 1, "match", 1): 11,
        ("calibration", "samples"): 16,
    }
    assert {path: recipe.where(*path) for path in lines} == {p: f"my.yaml:{n}" for p, n in lines.items()}


def test_where_falls_back_to_the_nearest_part_that_was_written():
    recipe = Recipe.from_yaml(FULL, "my.yaml")
    assert recipe.where("calibration", "tokens") == "my.yaml:15"
    assert recipe.where("rules", 0, "match", 0) == "my.yaml:7"
    assert recipe.where("rules", 99) == "my.yaml:6"
    assert recipe.where("nonsense") == recipe.where() == "my.yaml:2"


def test_a_recipe_without_a_file_still_says_where():
    assert Recipe.from_dict({"scheme": "x"}, source="settings").where("scheme") == "settings"
    assert Recipe(name="built", scheme="x").where("scheme") == "recipe 'built'"


def test_error_builds_a_message_with_place_and_path():
    error = Recipe.from_yaml(FULL, "my.yaml").error(("rules", 1, "match", 0), "matches nothing")
    assert isinstance(error, RecipeError) and isinstance(error, ValueError)
    assert str(error) == "my.yaml:11: rules[1].match[0]: matches nothing"


def test_positions_play_no_part_in_equality_and_survive_copies():
    recipe = Recipe.from_yaml(FULL, "my.yaml")
    assert recipe == Recipe.from_yaml("\n\n" + FULL, "other.yaml")
    assert hash(recipe) == hash(Recipe.from_yaml("\n" + FULL))
    assert recipe != Recipe(scheme="w8a16") and recipe != FULL
    for twin in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
        assert twin == recipe
        assert twin.where("rules", 0, "scheme", "rank") == "my.yaml:10"


def test_recipe_errors_survive_pickle():
    error = pickle.loads(pickle.dumps(RecipeError(["a", "b"])))
    assert error.problems == ("a", "b") and str(error) == "a\nb"


def test_a_recipe_is_frozen():
    recipe = Recipe(scheme="w8a16")
    for thing, field in ((recipe, "name"), (recipe.scheme, "name"), (recipe.calibration, "samples")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, field, 3)


def test_all_problems_come_at_once_in_the_order_of_the_file():
    text = """\
name: mine
rnuls: []
calibration: {samples: many, tokens: 0}
scheme: w8a16
min_features: 16.0
rules:
  - match: x
  - {match: x, skip: a, scheme: b}
  - {match: x, skip: a, untie: true}
  - {matches: x, skip: a}
  - lm_head
  - {match: [], skip: " "}
  - {match: "re:(", skip: a, optional: 1}
"""
    assert problems(text) == [
        "my.yaml:2: unknown key 'rnuls'; did you mean 'rules'? (known: name, description, version, scheme, "
        "rules, calibration, min_features, extends)",
        "my.yaml:3: calibration.samples: must be a whole number >= 1, got 'many'",
        "my.yaml:3: calibration.tokens: must be a whole number >= 1, got 0",
        "my.yaml:5: min_features: must be a whole number >= 1, got 16.0",
        "my.yaml:7: rules[0]: needs 'scheme', or 'skip' with the reason",
        "my.yaml:8: rules[1]: has both 'scheme' and 'skip'; a rule does one of them",
        "my.yaml:9: rules[2]: 'untie' goes with 'scheme': a skipped layer stays tied",
        "my.yaml:10: rules[3]: 'match' is missing",
        "my.yaml:10: rules[3]: unknown key 'matches'; did you mean 'match'? (known: match, scheme, skip, "
        "optional, untie)",
        "my.yaml:11: rules[4]: must be a mapping of keys to values, got 'lm_head'",
        "my.yaml:12: rules[5].match: must hold at least one pattern",
        "my.yaml:12: rules[5].skip: must not be empty",
        "my.yaml:13: rules[6].match[0]: the pattern 're:(' is not a valid regex: missing ), unterminated "
        "subpattern at position 0",
        "my.yaml:13: rules[6].optional: must be true or false, got 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "needs 'scheme', 'rules' or both"),
        ("rules: []", "needs 'scheme', 'rules' or both"),
        ("rules:", "rules: must be a list, got nothing (null)"),
        ("rules: {match: a, skip: b}", "rules: must be a list, got a mapping"),
        ("scheme: {rank: 3}", "scheme: 'name' is missing"),
        ("scheme: [w8a16]", "scheme: must be the name of a scheme, or a mapping with a name, got a list"),
        ("scheme: ''", "scheme.name: must not be empty"),
        (
            "scheme: {name: a, rank: [1]}",
            "scheme.rank: must be text, a number, true, false or null, got a list",
        ),
        ("scheme: {name: a, options: {rank: 1}}", "options stand beside the name"),
        ("scheme: {name: a, rank: .nan}", "scheme.rank: must be a finite number, got nan"),
        ("scheme: {name: a, rank: 99999999999999999999}", "scheme.rank: is far too large"),
        ("{scheme: a, calibration: 3}", "calibration: must be a mapping of keys to values, got 3"),
        ("{scheme: a, calibration: {samples: true}}", "samples: must be a whole number >= 1, got true"),
        ("{scheme: a, min_features: 99999999999999999999}", "min_features: is far too large"),
        ("{scheme: a, version: 2}", "version: this qgraft reads version 1 of the recipe format, got 2"),
        ("{scheme: a, description: [x]}", "description: must be text, got a list"),
        ("{scheme: a, calibration: {tokns: 3}}", "unknown key 'tokns'; did you mean 'tokens'?"),
        (
            "{scheme: a, group_size: 32}",
            "options of a scheme stand inside it, as in scheme: {name: ..., group_size: ...}",
        ),
        ("rules: [{match: a, scheme: b, rank: 8}]", "as in scheme: {name: ..., rank: ...}"),
        ("rules: [{match: a, scheme: b, options: {rank: 8}}]", "as in scheme: {name: ..., rank: 64}"),
        ("{architectures: [Llama], hidden_size: 8}", "is no recipe: it has none of a recipe's keys (name,"),
        (
            "rules: [{match: 're:*.up', skip: b}]",
            "not a valid regex: nothing to repeat at position 0; a shell glob goes",
        ),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(text, message):
    (problem,) = problems(text)
    assert problem.startswith("my.yaml:1: ") and message in problem


def test_a_file_with_thousands_of_faults_gets_one_page_of_them():
    found = problems("scheme: w8a16\n" + "".join(f"key{i}: 1\n" for i in range(2000)))
    assert len(found) == 51 and found[-1] == "and 1950 more"


def test_from_dict_copies_and_refuses_what_yaml_could_not_say():
    data = {"scheme": {"name": "w4a4_svd", "rank": 8}, "rules": ({"match": ("a", "b"), "skip": "c"},)}
    before = copy.deepcopy(data)
    recipe = Recipe.from_dict(data)
    data["scheme"]["rank"] = 9
    assert recipe.scheme.options == {"rank": 8} and data["rules"] == before["rules"]

    for bad, message in [
        ([], "<dict>: a recipe is a mapping of keys to values, got a list"),
        ({1: 2}, "<dict>: a key must be text, got 1"),
        ({"scheme": {"name": "a", None: 2}}, "<dict>: scheme: a key must be text, got nothing"),
        ({"scheme": {"name": "a", "rank": object()}}, "scheme.rank: .* got a Python object"),
        ({"scheme": "a", "min_features": 10**5000}, "far too large"),
    ]:
        with pytest.raises(RecipeError, match=message):
            Recipe.from_dict(bad)
    endless: dict = {}
    endless["scheme"] = endless
    with pytest.raises(RecipeError, match="nested deeper"):
        Recipe.from_dict(endless)


def test_models_can_be_built_in_python_in_the_short_forms():
    rule = Rule(match="lm_head", scheme={"name": "w4a4_svd", "rank": 8})
    assert rule.match == ("lm_head",) and rule.scheme.options == {"rank": 8}
    assert Recipe(rules=[rule]).rules == (rule,)
    assert Recipe.model_validate(Recipe(rules=[rule]).model_dump()).rules == (rule,)
    with pytest.raises(ValidationError):
        Rule(match="lm_head")


def test_subclasses_of_plain_types_are_written_as_plain_types():
    class Kind(str, Enum):
        fast = "two_level"

    class Half(float):
        pass

    recipe = Recipe(scheme=SchemeSpec(name="a", options={"scales": Kind.fast, "alpha": Half(0.5)}))
    assert recipe.scheme.options == {"scales": "two_level", "alpha": 0.5}
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_an_option_cannot_be_called_name():
    with pytest.raises(ValidationError, match="'name'"):
        SchemeSpec(name="a", options={"name": "b"})


breaks = st.text("\n\r\t\x85\u2028\u2029\ufeff\ud800 a", max_size=6)  # what YAML could lose
texts = st.one_of(st.text(max_size=20), breaks)
words = texts.filter(str.strip)
numbers = st.integers(1, 2**63 - 1)
options = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.sampled_from(["no", "1e-3", "0x1F", "2024-01-01", "~", "<<", "=", "1:30", "*a", "- b", "# c"]),
)
schemes = st.builds(
    SchemeSpec, name=words, options=st.dictionaries(texts.filter(lambda k: k != "name"), options, max_size=3)
)
patterns = st.lists(words.filter(lambda p: not p.startswith("re:")), min_size=1, max_size=3)
rules = st.one_of(
    st.builds(Rule, match=patterns, scheme=schemes, optional=st.booleans(), untie=st.booleans()),
    st.builds(Rule, match=patterns, skip=words, optional=st.booleans()),
)
recipes = st.builds(
    Recipe,
    name=words,
    description=texts,
    scheme=schemes,
    rules=st.lists(rules, max_size=3),
    calibration=st.builds(CalibrationSpec, samples=numbers, tokens=numbers),
    min_features=numbers,
)


@settings(max_examples=60, deadline=None)
@given(recipes)
def test_every_recipe_comes_back_from_dict_and_yaml_as_it_was(recipe):
    for twin in (Recipe.from_dict(recipe.to_dict()), Recipe.from_yaml(recipe.to_yaml())):
        assert twin == recipe
        # == calls 1, 1.0 and True the same; a recipe must not.
        assert repr(twin) == repr(recipe)
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()
