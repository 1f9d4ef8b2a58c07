"""``extends``: a recipe that says only what differs from another."""

import pytest

from qgraft.recipes import Recipe, RecipeError, SchemeSpec, load_recipe


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def fails(source, message: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert message in str(caught.value)
    return str(caught.value)


def test_a_child_says_only_what_differs(write):
    write(
        "base/base.yaml",
        "name: base\ndescription: of the base\nscheme: {name: s, rank: 1, alpha: 2}\n"
        "rules: [{match: a, skip: base}]\ncalibration: {samples: 3, tokens: 4}\nmin_features: 8\n",
    )
    recipe = load_recipe(
        write(
            "child.yaml",
            "extends: base/base.yaml\nscheme: {name: s, rank: 9}\n"
            "rules: [{match: b, skip: child}]\ncalibration: {tokens: 5}\n",
        )
    )
    assert recipe == Recipe(
        name="child",
        scheme=SchemeSpec(name="s", options={"rank": 9, "alpha": 2}),
        rules=[{"match": "b", "skip": "child"}, {"match": "a", "skip": "base"}],
        calibration={"samples": 3, "tokens": 5},
        min_features=8,
    )


def test_positions_point_into_the_file_that_each_value_came_from(write):
    base = write("base.yaml", "scheme:\n  name: s\n  rank: 1\n  alpha: 2\nrules:\n  - {match: a, skip: base}\n")
    child = write("child.yaml", "extends: base.yaml\nscheme:\n  rank: 9\nrules:\n\n  - {match: b, skip: c}\n")
    recipe = load_recipe(child)
    assert recipe.where("scheme") == f"{child}:2"
    assert recipe.where("scheme", "rank") == f"{child}:3"
    assert recipe.where("scheme", "alpha") == f"{base}:4"
    assert recipe.where("rules", 0, "match") == f"{child}:6"
    assert recipe.where("rules", 1, "match") == f"{base}:6"


def test_a_fault_of_the_parent_is_told_with_the_parents_line(write):
    write("base.yaml", "scheme: s\nmin_featurs: 3\n")
    message = fails(write("child.yaml", "extends: base.yaml\nmin_features: x\n"), "base.yaml:2: unknown key")
    assert "child.yaml:2: min_features: must be a whole number" in message


@pytest.mark.parametrize(
    ("parent", "child", "merged"),
    [
        ("{name: s, rank: 1}", "s", {"name": "s", "rank": 1}),
        ("{name: s, rank: 1}", "{name: s, alpha: 2}", {"name": "s", "rank": 1, "alpha": 2}),
        ("{name: s, rank: 1}", "{rank: 2}", {"name": "s", "rank": 2}),
        ("s", "{rank: 2}", {"name": "s", "rank": 2}),
        ("{name: s, rank: 1}", "t", "t"),
        ("{name: s, rank: 1}", "{name: t, alpha: 2}", {"name": "t", "alpha": 2}),
        ("s", "t", "t"),
    ],
)
def test_options_are_inherited_only_while_the_scheme_keeps_its_name(write, parent, child, merged):
    write("base.yaml", f"scheme: {parent}")
    assert load_recipe(write("child.yaml", f"extends: base.yaml\nscheme: {child}")).to_dict()["scheme"] == merged


def test_a_child_can_take_the_parents_scheme_away(write):
    write("base.yaml", "scheme: s\nrules: [{match: a, scheme: t}]")
    assert load_recipe(write("child.yaml", "extends: base.yaml\nscheme: null")).scheme is None


def test_a_parent_of_skip_rules_alone_can_be_extended(write):
    write("skips.yaml", "rules: [{match: lm_head, skip: head, optional: true}]")
    recipe = load_recipe(write("child.yaml", "extends: skips.yaml\nscheme: s"))
    assert recipe.scheme.name == "s" and recipe.rules[0].skip == "head"


def test_name_and_description_are_not_inherited(write):
    recipe = load_recipe(write("child.yaml", "extends: w8a16"))
    assert (recipe.name, recipe.description) == ("child", "")
    assert recipe.scheme == load_recipe("w8a16").scheme


def test_a_user_file_may_have_the_name_of_the_shipped_recipe_it_extends(write):
    assert load_recipe(write("w8a16.yaml", "extends: w8a16\nmin_features: 8")).min_features == 8


def test_text_and_dict_can_extend_too(write, tmp_path):
    write("base.yaml", "scheme: s")
    source = str(tmp_path / "imagined.yaml")
    assert Recipe.from_yaml("extends: base.yaml", source).scheme.name == "s"
    assert Recipe.from_dict({"extends": "base.yaml"}, source).scheme.name == "s"
    assert Recipe.from_dict({"extends": "w8a32"}).scheme.name == "w8a32"


def test_a_resolved_recipe_no_longer_extends(write):
    recipe = load_recipe(write("child.yaml", "extends: w4a4_svd\nscheme: {rank: 8}"))
    assert "extends" not in recipe.to_dict() and Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_circle_is_an_error_that_shows_the_chain(write):
    a = write("a.yaml", "extends: b.yaml")
    b = write("b.yaml", "extends: ./c.yaml")
    write("c.yaml", "scheme: s\nextends: a.yaml")
    message = fails(a, "extends: goes in a circle: ")
    assert message.partition("circle: ")[2].split(" -> ")[:2] == [a, b] and message.count(" -> ") == 3
    assert "c.yaml:2" in message
    fails(write("self.yaml", "extends: self.yaml"), "circle")


def test_a_very_long_chain_is_an_error(write):
    for i in range(40):
        write(f"r{i}.yaml", f"extends: r{i + 1}.yaml")
    fails(write("start.yaml", "extends: r0.yaml"), "more than 16 recipes in a row")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("w8a61", "extends: no shipped recipe is called 'w8a61'; did you mean 'w8a16'"),
        ("gone.yaml", "gone.yaml: no such file"),
        (".", "is neither"),
        ("/", "is a folder"),
        ("[a, b]", "extends: must be one shipped name or one path, got a list"),
        ("", "extends: must be one shipped name or one path, got nothing"),
        ("on", "put it in quotes"),
        ("''", "extends: must be one shipped name or one path"),
    ],
)
def test_a_parent_that_cannot_be_had_is_told_with_the_line_of_extends(write, value, message):
    message = "is a folder" if value == "." else message
    path = write("child.yaml", f"scheme: a\nextends: {value}")
    assert fails(path, message).startswith(f"{path}:2: extends: ")
