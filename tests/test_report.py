"""The numbers of the report against the same numbers computed here, in float64."""

import json
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from qgraft import Quantizer, Recipe, Report
from qgraft.quantizer import LayerReport
from qgraft.quantizer.cli_output import show
from qgraft.quantizer.html.advice import advise

SCHEMES = {
    "w8a32": "w8a32",
    "w8a16": "w8a16",
    "svd": {"name": "w4a4_svd", "rank": 4, "group_size": 32},
    "groups": {"name": "w4a4_svd", "rank": 0, "scales": "group", "group_size": 16, "smooth": "none"},
}


def recipe(scheme):
    return Recipe.from_dict({"scheme": SCHEMES[scheme], "min_features": 1})


def row(name="a", **values):
    usual = {"weight_error": 0.01, "output_sqnr": 30.0, "bytes_before": 2048, "bytes_after": 1024}
    usual |= {"scheme": "w8a32", "tokens": 5, "seconds": 0.25}
    return LayerReport(name=name, in_features=16, out_features=32, **usual | values)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(45, 37), (64, 20)])
def test_weight_error_sqnr_bytes_and_tokens_are_the_real_ones(scheme, bias, dtype, shape):
    k, n = shape
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    model = nn.Sequential(linear)
    x = torch.randn(2, 9, k).to(dtype)  # 18 tokens: all of them are in the sample
    quantizer = Quantizer(model)
    quantizer.quantize(recipe(scheme), calibration=x, progress=False)
    (found,), layer = quantizer.report.layers, model[0]

    weight = linear.weight.detach().double()
    error = (layer.dequantize().double() - weight).norm() / weight.norm()
    assert found.weight_error == pytest.approx(error.item(), rel=1e-4)

    exact = F.linear(x.double(), weight, linear.bias.detach().double() if bias else None)
    with torch.no_grad():
        noise = layer(x).double() - exact
    sqnr = 10 * math.log10(exact.square().sum() / noise.square().sum())
    assert found.output_sqnr == pytest.approx(sqnr, abs=0.1)

    assert found.bytes_before == linear.weight.nbytes + (linear.bias.nbytes if bias else 0)
    assert found.bytes_after == sum(t.nbytes for t in (*layer.buffers(), *layer.parameters()))
    assert found.tokens == 18 and found.seconds > 0
    assert (found.name, found.scheme) == ("0", layer.scheme_name)
    assert (found.in_features, found.out_features) == shape


def test_without_data_there_is_no_sqnr_and_no_token():
    quantizer = Quantizer(nn.Sequential(nn.Linear(20, 20)))
    quantizer.quantize(recipe("svd"), progress=False)
    (found,) = quantizer.report.layers
    assert found.output_sqnr is None and found.tokens == 0
    assert " - " in str(quantizer.report)


def test_the_bias_counts_in_the_sqnr():
    """A large bias that is added exactly makes the output, and so the ratio, larger."""
    found = []
    weight, x = torch.randn(20, 20), torch.randn(50, 20)
    for bias in (0.0, 1000.0):
        linear = nn.Linear(20, 20)
        linear.weight.data, linear.bias.data = weight.clone(), torch.full((20,), bias)
        quantizer = Quantizer(nn.Sequential(linear))
        quantizer.quantize(recipe("w8a32"), calibration=x, progress=False)
        found.append(quantizer.report.layers[0].output_sqnr)
    assert found[1] > found[0] + 20


def test_an_output_too_large_for_float16_has_no_sqnr_and_is_no_failure():
    linear = nn.Linear(32, 16, bias=False).half()
    nn.init.constant_(linear.weight, 60.0)
    model = nn.Sequential(linear)
    quantizer = Quantizer(model)
    quantizer.quantize(recipe("w8a16"), calibration=torch.full((4, 32), 500.0).half(), progress=False)
    assert quantizer.report.layers[0].output_sqnr is None
    json.loads(json.dumps(quantizer.report.to_dict()), parse_constant=pytest.fail)


def test_a_layer_without_any_error_has_a_finite_sqnr():
    linear = nn.Linear(16, 16, bias=False)
    nn.init.eye_(linear.weight)
    quantizer = Quantizer(nn.Sequential(linear))
    quantizer.quantize(recipe("w8a32"), calibration=torch.zeros(3, 16), progress=False)
    assert math.isfinite(quantizer.report.layers[0].output_sqnr)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_of_zeros_loses_nothing(scheme):
    linear = nn.Linear(32, 16)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    quantizer = Quantizer(nn.Sequential(linear))
    quantizer.quantize(recipe(scheme), calibration=torch.randn(30, 32), progress=False)
    (found,) = quantizer.report.layers
    assert found.weight_error == 0 and found.output_sqnr > 200 and advise([vars(found)]) == [[]]


def test_the_report_goes_through_json_and_back(tmp_path):
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
    quantizer = Quantizer(model)
    quantizer.quantize(recipe("svd"), calibration=torch.randn(7, 20), progress=False)
    quantizer.report.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert Report.from_dict(data) == quantizer.report and len(data["layers"]) == 2


@pytest.mark.parametrize(
    "change", [{"weight_error": "much"}, {"name": 3}, {"tokens": None}, {"bytes_after": [1]}, {"seconds": {}}]
)
def test_a_report_of_wrong_types_is_refused(change):
    data = Report((row(),)).to_dict()
    data["layers"][0].update(change)
    with pytest.raises(ValidationError):
        Report.from_dict(data)


def test_the_summary_adds_bytes_and_names_the_worst_layer():
    report = Report((row("a"), row("b", weight_error=0.2, bytes_after=512)))
    text = report.summary()
    assert "lowest output SQNR 30.0 dB in a" in text, "with data, the output counts"
    worse = Report((row("a"), row("b", output_sqnr=12.5), row("c", output_sqnr=None)))
    assert "lowest output SQNR 12.5 dB in b" in worse.summary()
    blind = Report(tuple(replace(r, output_sqnr=None) for r in report.layers))
    text = blind.summary()
    assert Report((row("a"),)).summary().startswith("1 layer: ")
    assert "2 layers: 4.0 KiB -> 1.5 KiB, 2.67x" in text and "20.00 % in b" in text
    assert Report(()).summary() == "no layer was quantized"


def test_the_table_joins_numbered_layers_with_mean_errors_and_summed_bytes():
    report = Report((row("layers.0.fc", weight_error=0.01), row("layers.1.fc", weight_error=0.03), row("head")))
    text = str(report)
    line = next(line for line in text.splitlines() if "layers.{0-1}.fc x2" in line)
    assert "2.00 %" in line and "4.0 KiB" in line and "2.0 KiB" in line and "30.0 dB" in line
    assert report.table().row_count == 2 and report.table(every=True).row_count == 3


def test_the_table_fits_into_80_columns_with_long_names(capsys):
    from rich.console import Console

    name = "model.language_model.layers.{}.self_attention.query_key_value_projection"
    model = nn.Module()
    model.register_module("m" * 90, nn.Linear(16, 16))
    Console(width=80).print(Report(tuple(row(name.format(i)) for i in range(3))).table())
    Console(width=80).print(Quantizer(model).plan("w8a32").table())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "query_key_value" in "".join(lines)


def test_printed_text_is_as_wide_as_the_terminal_up_to_100_columns(monkeypatch):
    long = Report(tuple(row(f"{'a' * 90}.{i}.{name}") for i in range(3) for name in ("query", "key")))
    for columns, width in (("80", 80), ("200", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert width - 5 < max(map(len, str(long).splitlines())) <= width


def test_a_narrow_terminal_shows_fewer_numbers_so_that_names_stay_whole(monkeypatch, capsys):
    report = Report(tuple(row(f"model.layers.{i}.self_attn.{name}_proj") for i in range(30) for name in "qk"))
    plan = Quantizer(nn.ModuleDict({"attention": nn.Linear(64, 64)})).plan("w8a32")
    monkeypatch.setenv("COLUMNS", "60")
    show(report.table(), plan.table())
    for text in (capsys.readouterr().out, str(report) + "\n" + str(plan)):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 60 and not any(word in text for word in ("seconds", "before", "shape"))
        assert any("model.layers.{0-29}." in line and "1.00 %" in line and "30.0 dB" in line for line in lines)
        assert any("attention" in line and "w8a32" in line and "4.5 KiB" in line for line in lines)


def test_a_printed_report_says_that_calibration_was_forgotten_where_it_helps():
    text = " ".join(str(Report((row(tokens=0, output_sqnr=None, scheme="w4a4_svd"),))).split())
    assert "worked from the weights alone" in text and "calibration=..." in text
    text = str(Report((row(tokens=0, output_sqnr=None, scheme="w8a16"),)))
    assert "error of the outputs is not known." in text and "weights alone" not in text
    assert "calibration" not in str(Report((row(tokens=500),)))


def test_brackets_in_a_name_or_recipe_are_shown_and_not_read_as_markup():
    assert "[/red]x" in str(Report((row("[/red]x"),)))
    named = Recipe.from_dict({"name": "[/bold] mine", "scheme": "w8a32"})
    assert "[/bold] mine" in str(Quantizer(nn.Linear(16, 16)).plan(named))


@pytest.mark.parametrize("sqnr", [None, 31.0])
def test_the_plot_is_an_image(tmp_path, sqnr):
    pytest.importorskip("matplotlib")
    Report((row("a", output_sqnr=sqnr), row("b", output_sqnr=None))).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
