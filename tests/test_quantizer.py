"""class Quantizer: what it refuses, what an interrupt leaves behind, and how much memory it takes."""

import gc
import subprocess
import sys
import textwrap
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from qgraft import Quantizer, QuantLinear, Recipe, SVDQW4A4Linear, W8A16Linear, W8A32Linear
from qgraft.quantizer import CalibrationError, PlanError, QuantizeError, surgery
from qgraft.recipes import RecipeError

RECIPES = {
    "w8a32": Recipe.from_dict({"scheme": "w8a32", "min_features": 1}),
    "w8a16": Recipe.from_dict({"scheme": "w8a16", "min_features": 1}),
    "svd": Recipe.from_dict(
        {"scheme": {"name": "w4a4_svd", "rank": 4, "group_size": 16, "smooth_alpha": 0.5}, "min_features": 1}
    ),
}


def chain(*widths, dtype=torch.float32):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).to(dtype)


def quantize(model, recipe="w8a32", **kw):
    return Quantizer(model).quantize(RECIPES.get(recipe, recipe), progress=False, **kw)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def twins(make):
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    return first, second


# -- refusals ----------


def test_only_a_module_can_be_quantized():
    with pytest.raises(TypeError, match=r"takes an nn.Module, got dict"):
        Quantizer({"weight": torch.zeros(3, 3)})
    with pytest.raises(TypeError, match=r"got str; load the model first, or take `qgraft quantize`"):
        Quantizer("model_dir")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_name_before_any_work(value, dtype):
    model = chain(19, 21, 17, 18, dtype=dtype)
    for i in (1, 2):
        with torch.no_grad():
            model[i].weight[3, 4] = value
    with pytest.raises(PlanError) as caught:
        quantize(model)
    assert str(caught.value).splitlines() == [f"layer '{i}' has NaN or infinite weights" for i in (1, 2)]
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_damaged_layer_that_a_rule_skips_does_not_matter():
    model = chain(19, 21, 17)
    model[1].weight.data[0, 0] = float("nan")
    rules = [{"match": "1", "skip": "damaged"}]
    quantize(model, Recipe.from_dict({"scheme": "w8a32", "rules": rules}))
    assert isinstance(model[0], QuantLinear) and type(model[1]) is nn.Linear


def test_an_unknown_recipe_and_one_of_a_wrong_type_are_refused():
    with pytest.raises(RecipeError, match="w8a16"):
        quantize(chain(16, 16), "w8a61")
    with pytest.raises(TypeError):
        quantize(chain(16, 16), 8)


@pytest.mark.parametrize("option", [{"smooth": "activations"}, {"rounding": "gptq"}])
def test_options_that_need_data_are_refused_before_the_first_layer(option):
    model = chain(32, 32, 32)
    recipe = Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 4, **option}})
    with pytest.raises(CalibrationError, match=r"layer '0': .*needs calibration data"):
        quantize(model, recipe)
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e19, 3e36])
@pytest.mark.parametrize("recipe", ["w8a32", "w8a16"])
def test_weights_of_extreme_size_are_quantized_as_well_as_others(scale, recipe):
    model = chain(33, 34)
    model[0].weight.data = torch.randn(34, 33) * scale
    quantize(model, recipe)
    assert model[0].report.weight_error < (0.02 if scale > 1e-25 else 1.01)


def test_a_weight_of_zeros_has_no_error():
    model = chain(33, 34)
    nn.init.zeros_(model[0].weight)
    quantize(model, "svd")
    assert model[0].report.weight_error == 0 and not model[0].dequantize().any()


# -- interrupts ----------


@pytest.mark.parametrize("recipe", ["w8a32", "w8a16", "svd"])
@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["quantize", "replace"])
def test_a_failure_in_the_middle_leaves_whole_layers_and_a_second_call_goes_on(monkeypatch, recipe, error, where):
    model, reference = twins(lambda: chain(19, 35, 22, 18, 40))
    originals, at = list(model), torch.randint(0, 4, ()).item()
    quantize(reference, recipe)
    calls = []

    def failing(function):
        def run(*args, **kw):
            calls.append(1)
            if len(calls) == at + 1:
                raise error
            return function(*args, **kw)

        return run

    with monkeypatch.context() as patch:
        if where == "quantize":
            kind = type(reference[0])
            patch.setattr(kind, "quantize", failing(kind.quantize))
        else:
            patch.setattr("qgraft.quantizer.graft.replace", failing(surgery.replace))
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else QuantizeError
        with pytest.raises(expected) as caught:
            quantize(model, recipe)
    for i, layer in enumerate(model):
        assert isinstance(layer, QuantLinear) if i < at else layer is originals[i]
    message = str(caught.value)
    assert f"layer '{at}'" in message and f"{at} of 4 layers are done" in message
    assert "call quantize() again" in message
    if error.args:
        assert error.args[0] in message and type(error).__name__ in message
    quantize(model, recipe)
    assert same_state(model, reference)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failure_between_the_places_of_a_shared_layer_takes_all_of_them_back(monkeypatch, at):
    shared = nn.Linear(20, 20)
    model = nn.ModuleList([nn.ModuleList([shared]) for _ in range(3)])
    reached = []
    get_submodule = nn.Module.get_submodule

    def failing(self, name):
        if self is model and name == str(at):
            reached.append(name)
            raise KeyboardInterrupt
        return get_submodule(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "get_submodule", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize(model)
    assert reached and all(place[0] is shared for place in model)
    quantize(model)
    assert isinstance(model[0][0], QuantLinear) and model[0][0] is model[1][0] is model[2][0]


def test_hooks_on_a_layer_that_failed_still_work_and_can_be_removed(monkeypatch):
    model, seen = chain(16, 16), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with monkeypatch.context() as patch:
        patch.setattr("qgraft.quantizer.surgery._ancestors", lambda *_: 1 / 0)
        with pytest.raises(QuantizeError, match="ZeroDivisionError"):
            quantize(model)
    model(torch.randn(1, 16))
    handle.remove()
    model(torch.randn(1, 16))
    assert type(model[0]) is nn.Linear and seen == [1]


def test_a_layer_that_comes_out_not_finite_is_not_put_in_place(monkeypatch):
    model = chain(16, 16)
    monkeypatch.setattr(W8A32Linear, "quantize", lambda self, w, stats=None: self.scale.fill_(float("nan")))
    with pytest.raises(QuantizeError, match="not finite"):
        quantize(model)
    assert type(model[0]) is nn.Linear


def test_a_root_linear_is_named_in_words(monkeypatch):
    monkeypatch.setattr(W8A32Linear, "quantize", lambda *_: 1 / 0)
    with pytest.raises(QuantizeError, match=r"layer '\(the model\)' \(w8a32, 17 x 16\): ZeroDivisionError"):
        quantize(nn.Linear(16, 17))


# -- memory and noise ----------


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("recipe", ["w8a16", "svd"])
def test_each_float_weight_is_gone_before_the_next_layer_is_quantized(monkeypatch, recipe, calibrated):
    model = chain(*[32] * 7)
    weights = [weakref.ref(layer.weight) for layer in model]
    done, statistics = [], []
    kind = SVDQW4A4Linear if recipe == "svd" else W8A16Linear
    original = kind.quantize

    def watched(self, weight, stats=None):
        assert (stats is not None) == calibrated and not any(ref() for ref in statistics)
        statistics.extend([weakref.ref(stats)] if calibrated else [])
        assert [ref() is None for ref in weights] == [True] * len(done) + [False] * (6 - len(done))
        done.append(1)
        original(self, weight, stats)

    monkeypatch.setattr(kind, "quantize", watched)
    gc.disable()  # by reference counts alone: a cycle would keep the weight until some later collection
    try:
        data = torch.randn(4, 32) if calibrated else None
        Quantizer(model).quantize(RECIPES[recipe], calibration=data, progress=False)
        assert len(done) == 6 and not any(ref() is not None for ref in weights)
        assert not any(ref() for ref in statistics)
    finally:
        gc.enable()


PEAK = textwrap.dedent("""
    import resource, torch
    from torch import nn
    from qgraft import Quantizer
    torch.set_num_threads(1)
    def chain(n): return nn.Sequential(*(nn.Linear(512, 512) for _ in range(n)))
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Quantizer(chain(1)).quantize("w8a32", progress=False)  # imports, thread pools, scratch memory
    model = chain(96)
    before = peak()
    Quantizer(model).quantize("w8a32", progress=False)
    print(peak() - before)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_the_peak_of_memory_grows_by_a_few_layers_and_not_by_the_model():
    environment = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
    # The 96 float layers hold 96 MiB, their codes 24 MiB.
    assert float(done.stdout) < 6


@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_printed_when_there_is_no_terminal_or_no_progress_is_wanted(capfd, progress):
    model = chain(16, 18, 16)
    Quantizer(model).quantize(RECIPES["svd"], calibration=torch.randn(8, 16), progress=progress)
    out, err = capfd.readouterr()
    assert err == "" and out == ""


def test_progress_off_is_silent_on_a_terminal_too(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    quantize(chain(16, 18, 16), calibration=[torch.randn(8, 16)])
    assert capfd.readouterr().err == ""


def test_a_path_to_a_recipe_works_as_its_name_does(tmp_path):
    file = Path(tmp_path, "mine.yaml")
    file.write_text("scheme: w8a16\n")
    model = chain(16, 18)
    Quantizer(model).quantize(file, progress=False)
    Quantizer(other := chain(16, 18)).quantize(str(file), progress=False)
    assert model[0].scheme_name == other[0].scheme_name == "w8a16"


@pytest.mark.parametrize("recipe", ["w8a32", "svd"])
def test_quantizing_leaves_the_random_numbers_of_the_user_alone(recipe):
    model = chain(20, 30, 20)
    state = torch.get_rng_state()
    quantize(model, recipe, calibration=torch.ones(3, 20))
    assert torch.equal(state, torch.get_rng_state())
