"""Recipes as YAML text: the traps of YAML are explained, and no text can hurt."""

import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qgraft.recipes import Recipe, RecipeError


def fails(text: str, message: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, "my.yaml")
    assert message in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["name: on\nscheme: a", "scheme: a\nrules: [{match: [no], skip: a}]"])
def test_a_bare_no_or_on_is_explained_and_not_taken_for_a_bool(text):
    fails(text, "YAML reads a bare yes, no, on or off as true or false; put it in quotes")


def test_a_number_where_text_belongs_is_explained():
    fails("scheme: a\nrules: [{match: [12], skip: a}]", "my.yaml:2: rules[0].match[0]: must be text, got 12")
    fails("scheme: 8", "scheme: must be the name of a scheme, or a mapping with a name, got 8")


def test_a_key_that_yaml_reads_as_something_else_is_refused():
    for key in ("on", "1", "1.5", "~"):
        fails(f"scheme: a\n{key}: b", f"my.yaml:2: a key must be text; put '{key}' in quotes")
    for key in ("[a]", "{a: b}"):
        fails(f"? {key}\n: b", "a key must be text, not a list or a mapping")


@pytest.mark.parametrize("pattern", ["*.down_proj", "*lm_head"])
def test_a_star_without_quotes_is_explained(pattern):
    message = fails(f"scheme: a\nrules:\n  - match: [{pattern}]\n    skip: b", "must be in quotes")
    assert message.startswith("my.yaml:3: ")


def test_a_duplicate_key_is_refused_with_both_lines():
    message = fails("scheme: a\nname: x\nscheme: b\ncalibration: {tokens: 1, tokens: 2}\n", "my.yaml:3:")
    assert message.splitlines() == [
        "my.yaml:3: the key 'scheme' stands on line 1 and again on line 3",
        "my.yaml:4: the key 'tokens' stands on line 4 and again on line 4",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.yaml: empty"),
        ("# only a comment\n", "my.yaml: empty"),
        ("---\nnull\n", "my.yaml: empty"),
        ("- a\n", "my.yaml:1: a recipe is a mapping of keys to values, got a list"),
        ("w8a16", "my.yaml:1: a recipe is a mapping of keys to values, got 'w8a16'"),
        ("scheme: a\n---\nscheme: b\n", "my.yaml:2: a second document begins"),
        ("scheme: a\nrules: [\n", "my.yaml:3: not valid YAML"),
        ("scheme: a: b\n", "my.yaml:1: not valid YAML"),
        ("scheme: a\n\trules: []\n", "my.yaml:2: not valid YAML"),
        ("scheme: a\nrules:\n\t- b\n", "indent with spaces, not tabs"),
        ("rules:\n  - match: a\n   skip: b\n", "my.yaml:3: not valid YAML"),
        ("rules:\n  - match: a\n   skip: b\n", "is it indented like the lines above it?"),
        ("scheme: a\n name: b\n", "my.yaml:2: not valid YAML"),
        ("scheme: a\nname: \x07\n", "my.yaml:2: the character U+0007 is not allowed in YAML"),
        ('scheme: "\\UFFFFFFFF"\n', "my.yaml: not valid YAML"),
        ("scheme: a\nmin_features: 0x_\n", "my.yaml:2: cannot read the number '0x_'"),
        (f"scheme: a\nmin_features: {'9' * 5000}\n", "my.yaml:2: cannot read the number"),
    ],
)
def test_what_is_not_a_recipe_at_all_is_said_with_file_and_line(text, message):
    fails(text, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: &a w8a16", "anchors (&a) are not read"),
        ("calibration: &a\n  samples: 3", "anchors (&a) are not read"),
        ("scheme: *a", "aliases (*a) are not read"),
        ("scheme: a\n<<: {name: b}", "merge keys (<<) are not read; use 'extends'"),
        ("scheme: !!python/object/apply:os.system [ls]", "tags ("),
        ("scheme: !mine a", "tags (!mine) are not read"),
        ("scheme: !!str no", "tags ("),
    ],
)
def test_only_the_plain_part_of_yaml_is_read(text, message):
    fails(text, message)


def test_dates_and_times_stay_the_text_that_was_written():
    recipe = Recipe.from_yaml("name: 2024-01-01\nscheme: {name: a, since: 2024-01-01 10:00:00}")
    assert recipe.name == "2024-01-01" and recipe.scheme.options["since"] == "2024-01-01 10:00:00"


def test_windows_line_ends_and_a_byte_order_mark_are_fine():
    recipe = Recipe.from_yaml("\ufeffname: a\r\nscheme: w8a16\r\n", "my.yaml")
    assert recipe.name == "a" and recipe.where("scheme") == "my.yaml:2"


@pytest.mark.parametrize(
    "text",
    [
        "scheme: " + "[" * 400_000,
        "- " * 400_000,
        "? " * 400_000,
        "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a, *a]\n" for i in range(50)),
        "scheme: {name: a, rank: " + "9" * 1_000_000 + "}",
        "scheme: {name: a, rank: " + "1:" * 500_000 + "1}",
        "x" * (1 << 21),
    ],
)
def test_a_text_made_to_exhaust_the_reader_is_refused_quickly(text):
    start = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert time.perf_counter() - start < 10
    assert len(str(caught.value)) < 10_000


words = ["scheme", "rules", "match", "skip", "extends", "w8a16", "re:(", "no", "&a", "---", "<<", ": ", "- "]
fragments = st.lists(st.sampled_from([*words, *"[]{},*'\"~|>!%#? \n\t"]), max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.one_of(fragments, st.text(max_size=40)))
@example("%YAML 1.99999999999999999999\n---\nscheme: a")
@example("scheme: \ud800")
@example('extends: "\\0.yaml"')
@example('extends: "\\ud800.yaml"')
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    try:
        recipe = Recipe.from_yaml(text)
    except RecipeError as error:
        assert error.problems and all(error.problems)
    else:
        assert isinstance(yaml.safe_load(text), dict)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
