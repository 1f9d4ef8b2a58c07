"""Which layers the report points at, and that its rules are rules."""

import random

import pytest
from torch import nn

from qgraft import Quantizer, Recipe
from qgraft.quantizer.html.advice import advise, notes_on


def row(name="a", scheme="w4a4_svd", error=0.1, sqnr=25.0, **values):
    return {
        "name": name,
        "scheme": scheme,
        "in_features": 256,
        "out_features": 128,
        "weight_error": error,
        "output_sqnr": sqnr,
        "bytes_before": 4 * 256 * 128,
        "bytes_after": 256 * 128 // 2,
        "tokens": 2048,
        "seconds": 0.1,
        "options": {},
        **values,
    }


def usual(n=20, **values):
    return [row(f"l.{i}", error=random.uniform(0.095, 0.105), sqnr=random.uniform(24, 26), **values) for i in range(n)]


def test_layers_that_are_alike_get_no_advice():
    assert not any(advise(usual()))


def test_a_layer_whose_weights_stand_out_is_told_to_raise_its_rank():
    rows = [*usual(options={"rank": 16}), row("bad", error=0.4, options={"rank": 16, "group_size": 32})]
    *others, (advice,) = advise(rows)
    assert not any(others)
    assert "40.00 %" in advice.what and "from 16 to 32" in advice.do
    (rule,) = Recipe.from_yaml("rules:\n" + advice.rule).rules
    assert rule.match == ("bad",)
    assert rule.scheme.name == "w4a4_svd" and rule.scheme.options == {"group_size": 32, "rank": 32}


def test_where_the_rank_cannot_grow_it_is_told_to_take_8_bits():
    rows = [*usual(options={"rank": 64}), row("bad", error=0.4, options={"rank": 64})]
    assert "w8a16" in advise(rows)[-1][0].do


def test_a_layer_whose_inputs_are_at_fault_gets_more_bits_for_them():
    for scheme, remedy in (("w4a4_svd", "w4a8_svd"), ("w8a8", "w8a16"), ("w8a8_static", "w8a8")):
        rows = [*usual(scheme=scheme), row("bad", scheme=scheme, sqnr=12.0)]
        *others, (advice,) = advise(rows)
        assert not any(others) and "output error stands out" in advice.what and advice.rule
        assert Recipe.from_yaml("rules:\n" + advice.rule).rules[0].scheme.name == remedy


def test_a_low_ratio_is_said_even_where_all_are_low():
    found = advise([row(f"l.{i}", sqnr=6.0) for i in range(10)])
    assert all("50 % of the output" in items[0].what for items in found)


def test_what_does_no_harm_is_not_pointed_at():
    rows = [row(f"l.{i}", "w8a16", 0.004 + i * 1e-6, 45 + i * 1e-3) for i in range(20)]
    assert not any(advise([*rows, row("bad", "w8a16", 0.015, 37.0)]))
    assert not any(advise([*usual(), row("weights alone", error=0.4, sqnr=35.0)])), "the output is what counts"


def test_schemes_are_not_compared_with_each_other():
    rows = [row(f"l.{i}", "w8a16", 0.004 + i * 1e-6, 45 + i * 1e-3) for i in range(20)]
    assert not any(advise([*rows, row("four", "w4a16", 0.1, 20.0)]))


def test_an_overflowing_output_and_a_layer_that_saves_little_are_said():
    (first,), (second,) = advise([row(sqnr=None), row(bytes_after=4 * 256 * 120)])
    assert "overflow" in first.what and "94 %" in second.what and "skip" in second.rule


def test_the_report_as_a_whole_misses_data():
    assert "No calibration data" in notes_on([row(tokens=0, sqnr=None)])[0]
    assert "did not reach 1 layer: b" in notes_on([row(), row("b", tokens=0, sqnr=None)])[0]
    assert "fewer tokens" in notes_on([row(tokens=200)])[0]
    assert notes_on([row(scheme="w8a16", tokens=200)]) == [], "which learns nothing from them"
    assert notes_on([row()]) == [] and notes_on([row(scheme="embedding_w8", tokens=0)]) == []


@pytest.mark.parametrize("name", ["deep.1.fc", "a [b]*?", "re:x", "y: 'z'", "</script>", "- #"])
def test_the_rule_reaches_the_layer_whatever_its_name(name):
    rule = advise([*usual(), row(name, error=0.5)])[-1][0].rule
    parts = name.split(".")
    model = inner = nn.Module()
    for part in parts[:-1]:
        inner._modules[part] = inner = nn.Module()
    inner._modules[parts[-1]] = nn.Linear(128, 128)
    (layer,) = Quantizer(model).plan(Recipe.from_yaml("scheme: w4a4_svd\nrules:\n" + rule)).layers
    assert layer.scheme_name == "w8a16"


def test_the_root_has_no_name_that_a_rule_could_give():
    assert advise([*usual(), row("", error=0.5)])[-1][0].rule == ""
