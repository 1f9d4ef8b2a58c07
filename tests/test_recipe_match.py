"""Patterns of a recipe, and the suggestions when one misses."""

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft.recipes import RecipeError, pattern_matches, suggest
from qgraft.recipes.suggest import did_you_mean

DOWN = "model.layers.10.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (DOWN, True),
        ("down_proj", False),
        ("model.layers.10", False),
        ("*.down_proj", True),
        ("*down*", True),
        ("*", True),
        ("model.layers.1?.mlp.*", True),
        ("model.layers.[0-9].*", False),
        ("model.layers.1[!1].*", True),
        ("*.DOWN_proj", False),
        ("Linear", True),
        ("linear", False),
        ("Lin*", False),
        (r"re:.*\.(up|down)_proj", True),
        (r"re:model\.layers\.10", False),
        (r"re:.*layers\.1\..*", False),
        ("re:down_proj", False),
        ("re:Linear", False),
        ("re:(?i).*DOWN_PROJ", True),
    ],
)
def test_a_pattern_is_an_exact_name_a_glob_a_class_or_a_regex(pattern, matches):
    assert pattern_matches(pattern, DOWN, "Linear") is matches


def test_the_root_module_is_reached_by_its_class_or_a_star():
    assert pattern_matches("Linear", "", "Linear") and pattern_matches("*", "", "Linear")
    assert not pattern_matches("*.fc", "", "Linear")


@pytest.mark.parametrize("pattern", ["re:(", "re:[z-a]", "re:*a", "re:a{99999999999999999999}", "re:" + "(" * 500])
def test_a_bad_regex_is_an_error_with_its_text_and_reason(pattern):
    with pytest.raises(RecipeError) as caught:
        pattern_matches(pattern, "a", "b")
    assert pattern in str(caught.value) and "is not a valid regex: " in str(caught.value)


@pytest.mark.parametrize("pattern", ["", "  ", "re:"])
def test_an_empty_pattern_is_an_error(pattern):
    with pytest.raises(RecipeError, match="is empty"):
        pattern_matches(pattern, "a", "b")


def test_a_pattern_has_at_most_512_characters():
    assert pattern_matches("a" * 512, "a" * 512, "")
    with pytest.raises(RecipeError, match="513 characters, the most is 512"):
        pattern_matches("a" * 513, "a" * 513, "")


def test_a_glob_of_many_stars_is_quick():
    start = time.perf_counter()
    assert not pattern_matches("*a" * 200 + "b", "a" * 400, "")
    assert time.perf_counter() - start < 2


names = st.lists(st.text("ab0_", min_size=1, max_size=4), max_size=5).map(".".join)
globs = st.text("ab0_.*?[]!-", min_size=1, max_size=10)


@settings(deadline=None)
@given(names)
def test_every_name_matches_itself_and_its_own_escaped_regex(name):
    if name:
        assert pattern_matches(name, name, "Linear")
        assert pattern_matches("re:" + re.escape(name), name, "Linear")
        assert not pattern_matches("re:" + re.escape(name), name + ".x", "Linear")


@settings(max_examples=200, deadline=None)
@given(globs, names)
def test_a_glob_means_what_the_shell_means(pattern, name):
    expected = pattern == name or fnmatch.fnmatchcase(name, pattern)
    assert pattern_matches(pattern, name, "") == expected


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(max_size=20), st.text(max_size=8))
def test_any_pattern_gives_an_answer_or_a_recipe_error(pattern, name, class_name):
    for text in (pattern, "re:" + pattern):
        try:
            assert pattern_matches(text, name, class_name) in (True, False)
        except RecipeError as error:
            assert repr(text)[:50] in str(error)


# --- suggestions

MODULES = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
] + ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("word", "best"),
    [
        ("lm_haed", "lm_head"),
        ("LM_Head", "lm_head"),
        ("model.lm_head", "lm_head"),
        ("*.dwn_proj", "model.layers.0.mlp.down_proj"),
        ("down_proj", "model.layers.0.mlp.down_proj"),
        ("mlp.upproj", "model.layers.0.mlp.up_proj"),
        ("encoder.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.7.mlp.dwn_proj", "model.layers.7.mlp.down_proj"),
        ("model.layers.*.self_attn.qproj", "model.layers.0.self_attn.q_proj"),
        (r"re:.*\.k_prj", "model.layers.0.self_attn.k_proj"),
    ],
)
def test_a_mistyped_module_finds_the_one_that_was_meant(word, best):
    assert suggest(word, MODULES)[0] == best


def test_repeated_blocks_are_suggested_once():
    found = suggest("*.gate_prj", MODULES, n=3)
    assert found[0] == "model.layers.0.mlp.gate_proj"
    assert len({name.rpartition(".")[2] for name in found}) == len(found)


def test_numbers_inside_a_word_are_not_blocks():
    assert set(suggest("w8a61", ["w8a16", "w8a32", "w4a16"])) >= {"w8a16", "w8a32"}


def test_nothing_near_gives_nothing():
    assert suggest("zzzz", MODULES) == suggest("", MODULES) == suggest("*", MODULES) == suggest("a", []) == []
    assert did_you_mean("zzzz", MODULES) == ""


def test_did_you_mean_is_the_end_of_a_message():
    assert did_you_mean("rnuls", ["rules", "scheme"]) == "; did you mean 'rules'?"


def test_a_model_of_thousands_of_modules_is_searched_quickly():
    many = [f"blocks.{i}.experts.{j}.{part}" for i in range(60) for j in range(64) for part in ("w1", "w2", "w3")]
    start = time.perf_counter()
    assert suggest("blocks.59.experts.63.w_2", many)[0] == "blocks.59.experts.63.w2"
    assert time.perf_counter() - start < 5


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=8), st.integers(0, 4))
def test_suggestions_are_at_most_n_distinct_known_names(word, known, n):
    found = suggest(word, known, n)
    assert len(found) == len(set(found)) <= n and set(found) <= set(known)


@settings(deadline=None)
@given(st.text("abcdef_", min_size=1, max_size=12), st.lists(st.text("abcdef_", min_size=1), max_size=5))
def test_an_exact_name_is_its_own_best_suggestion(word, known):
    assert suggest(word, [*known, word])[0] == word
