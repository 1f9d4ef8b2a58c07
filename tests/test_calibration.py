"""Running data through a model to collect statistics: any form of data, and a model left as it was."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qgraft import Quantizer, QuantLinear, Recipe
from qgraft.layers import Stats
from qgraft.quantizer import CalibrationError, QuantizeError, calibration
from qgraft.recipes import CalibrationSpec

WIDTH = 32
BOTH = frozenset({"absmax", "second_moment"})
SVD = {"name": "w4a4_svd", "rank": 4, "group_size": 16}


def recipe(scheme=SVD, **kw):
    return Recipe.from_dict({"scheme": scheme, "min_features": 1, **kw})


class Attention(nn.Module):
    """q, k and v read one tensor, and so do gate and up; dropout would change what they read."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)

    def forward(self, x, scale=1.0):
        h = self.drop(self.norm(x)) * scale
        x = x + self.o(torch.sigmoid(self.q(h) * self.k(h)) * self.v(h))
        return self.gate(x) * self.up(x)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None):
        return self.fc(self.embed(input_ids))


def tokenizer(text, return_tensors, truncation, max_length):
    assert return_tensors == "pt" and truncation
    ids = torch.tensor([[ord(c) % 20 for c in text][:max_length]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def gather(model, data, share=True, samples=128, needs=BOTH, tokens=512):
    layers = linears(model)
    run = calibration.make_runner(data, CalibrationSpec(samples=samples, tokens=tokens), tokenizer, progress=False)
    if share:
        return calibration.collect(model, layers, dict.fromkeys(layers, needs), run)
    return {name: calibration.collect(model, {name: m}, {name: needs}, run).get(name) for name, m in layers.items()}


def tokens_seen(model, data, **kw):
    return {name: stats.tokens for name, stats in gather(model, data, **kw).items()}


# -- forms of data ----------

X = torch.randn(6, 5, WIDTH)
FORMS = {
    "tensor": lambda: X,
    "dict": lambda: {"x": X},
    "list of tensors": lambda: [X[:4], X[4:]],
    "list of dicts": lambda: [{"x": X[:4], "scale": 1.0}, {"x": X[4:]}],
    "list of tuples": lambda: [(X[:2], 1.0), (X[2:],)],
    "DataLoader of tensors": lambda: DataLoader(list(X), batch_size=4),
    "DataLoader of lists": lambda: DataLoader(TensorDataset(X), batch_size=4),
    "generator": lambda: (x[None] for x in X),
    "function": lambda: lambda model: [model(x) for x in X],
}


@pytest.mark.parametrize("form", FORMS)
def test_data_of_any_form_gives_the_same_statistics(form):
    model = Attention()
    found, expected = gather(model, FORMS[form]()), gather(model, [X], share=False)
    assert found.keys() == linears(model).keys()
    for name in found:
        assert found[name].tokens == 30
        torch.testing.assert_close(found[name].absmax, expected[name].absmax, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].second_moment, expected[name].second_moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_quantizes_a_model(form):
    quantizer = Quantizer(Attention())
    quantizer.quantize(recipe(), calibration=FORMS[form](), progress=False)
    assert [row.tokens for row in quantizer.report.layers] == [30] * 6
    assert all(row.output_sqnr > 5 for row in quantizer.report.layers)


@pytest.mark.parametrize(
    "texts", [["hello world", "abc"], "hello worldabc", ("hello world", "abc"), iter(["hello world", "abc"])]
)
def test_texts_are_tokenized_one_by_one(texts):
    assert tokens_seen(Words(), texts) == {"fc": 14}


def test_texts_are_cut_at_the_tokens_of_the_recipe():
    assert tokens_seen(Words(), ["hello world", "abc"], tokens=4) == {"fc": 7}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (["a text"], "need a tokenizer"),
        ([], "is empty"),
        (iter(()), "is empty"),
        (7, "cannot calibrate with a int"),
        ([{"wrong": torch.zeros(1, 2)}], r"batch 0 \(wrong: \(1, 2\) float32\): TypeError: .*wrong"),
        ([X, torch.zeros(2, 3)], r"batch 1 \(\(2, 3\) float32\): RuntimeError: "),
        ([[X, 1.0, 2]], r"batch 0 \(\(6, 5, 32\) float32, float, int\): TypeError"),
        (lambda model: model(torch.zeros(2, 3)), "calibration function failed: RuntimeError: "),
    ],
)
def test_data_that_does_not_run_is_explained_and_nothing_is_quantized(data, words):
    model = Attention()
    with pytest.raises(CalibrationError, match=words):
        Quantizer(model).quantize(recipe(), calibration=data, progress=False)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(value):
    model = Attention()
    model.o.bias.data[3] = value
    with pytest.raises(CalibrationError, match=r"layer 'gate': .*NaN or infinite"):
        gather(model, X)


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (torch.randn(50, WIDTH), 7),
        ([torch.randn(3, WIDTH)] * 9, 7),
        ([torch.randn(1, WIDTH)] * 9, 7),
        ([torch.randn(WIDTH)] * 9, 7),
        ({"x": torch.randn(50, WIDTH), "scale": torch.randn(50, 1)}, 7),
        ({"x": torch.randn(50, WIDTH), "scale": torch.randn(1, WIDTH)}, 7),
        ({"x": torch.randn(4, WIDTH)}, 4),
        (
            {"x": torch.randn(9, 5, WIDTH), "scale": torch.randn(5, WIDTH)},
            45,
        ),  # which is the batch? used whole
    ],
)
def test_no_more_samples_are_used_than_the_recipe_says(data, rows):
    if isinstance(data, list) and data[0].ndim == 1:
        data = [x[None] for x in data]
    assert set(tokens_seen(Attention(), data, samples=7, tokens=1).values()) == {rows}


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (torch.randn(50, WIDTH), 21),
        ([torch.randn(5, WIDTH)] * 9, 21),
        ({"x": torch.randn(50, WIDTH), "scale": torch.randn(50, 1)}, 21),
        (torch.randn(50, 2, WIDTH), 14),
        ([torch.randn(4, WIDTH), torch.randn(9, 2, WIDTH)], 4 + 5 * 2),  # room for 17 tokens is room for 5 sequences
    ],
)
def test_rows_of_a_float_matrix_count_as_tokens_and_not_as_sequences(data, seen):
    assert set(tokens_seen(Attention(), data, samples=7, tokens=3).values()) == {seen}


def test_rows_of_token_ids_count_as_sequences():
    ids = torch.randint(0, 20, (50, 4))
    assert set(tokens_seen(Words(), ids, samples=7).values()) == {28}


def test_a_generator_is_not_drawn_further_than_needed():
    drawn = []

    def batches():
        for i in range(100):
            drawn.append(i)
            yield torch.randn(2, WIDTH)

    gather(Attention(), batches(), samples=6, tokens=1)
    assert len(drawn) <= 4


# -- what is left behind ----------


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_hooks_are_as_before_even_after_an_error_and_dropout_is_off(fails):
    model = Attention()
    model.train()
    model.v.eval()
    flags = {name: m.training for name, m in model.named_modules()}
    grads = []
    model.o.register_forward_hook(lambda m, args, out: grads.append((out.requires_grad, m.training)))
    hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    if fails:
        with pytest.raises(CalibrationError):
            gather(model, [X, torch.zeros(1, 3)])
    else:
        first, second = gather(model, X), gather(model, X)
        assert all(torch.equal(first[name].sample, second[name].sample) for name in first)  # without dropout
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert {name: len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert set(grads) == {(False, False)} and torch.is_grad_enabled()


def test_a_keyboard_interrupt_in_the_data_passes_and_leaves_the_model_as_it_was():
    def data(model):
        raise KeyboardInterrupt

    model = Attention()
    with pytest.raises(KeyboardInterrupt):
        Quantizer(model).quantize(recipe(), calibration=data, progress=False)
    assert model.training and not model.q._forward_pre_hooks and type(model.q) is nn.Linear


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.empty = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        self.empty(x[:0])
        return self.used(x)


def test_layers_that_no_data_reaches_are_quantized_from_their_weights_with_a_warning():
    model = PartlyUsed()
    reference = PartlyUsed()
    reference.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"did not reach idle, empty \(2 in all\)"):
        Quantizer(model).quantize(recipe(), calibration=torch.randn(4, WIDTH), progress=False)
    Quantizer(reference).quantize(recipe(), progress=False)
    for name in ("idle", "empty"):
        found, expected = model.get_submodule(name).state_dict(), reference.get_submodule(name).state_dict()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert model.idle.report.tokens == 0 and model.used.report.tokens == 4


def test_a_layer_that_needs_data_and_gets_none_is_named_before_any_is_replaced():
    model = PartlyUsed()
    with pytest.raises(CalibrationError, match=r"layer 'idle': the calibration data does not reach it.*gptq"):
        Quantizer(model).quantize(
            recipe({**SVD, "rounding": "gptq"}), calibration=torch.randn(4, WIDTH), progress=False
        )
    assert type(model.used) is nn.Linear


# -- waves ----------


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_a_small_memory_for_statistics_takes_several_passes_and_gives_a_valid_model(monkeypatch, layers):
    monkeypatch.setattr("qgraft.quantizer.stages.STATS_BYTES", layers * 4 * WIDTH**2)
    passes = []
    collect = calibration.collect

    def counted(model, wanted, needs, run):
        passes.append(list(wanted))
        return collect(model, wanted, needs, run)

    monkeypatch.setattr(calibration, "collect", counted)
    model = Attention().eval()
    exact = model(X)
    quantizer = Quantizer(model)
    quantizer.quantize(recipe("w4a4_svd", min_features=1), calibration=(x for x in X.split(2)), progress=False)
    assert max(map(len, passes)) == max(layers, 1) and sum(map(len, passes)) == 6
    assert [row.tokens for row in quantizer.report.layers] == [30] * 6
    with torch.no_grad():
        assert (model(X) - exact).norm() < 0.2 * exact.norm()


def test_schemes_without_statistics_take_one_pass_whatever_the_memory(monkeypatch):
    monkeypatch.setattr("qgraft.quantizer.stages.STATS_BYTES", 1)
    calls = []
    model = Attention()
    data = lambda m: (calls.append(1), m(X))  # noqa: E731
    Quantizer(model).quantize(recipe("w8a16"), calibration=data, progress=False)
    assert len(calls) == 1 and model.q.report.output_sqnr > 20


def test_calibration_of_a_root_linear_and_of_keyword_inputs():
    quantizer = Quantizer(nn.Linear(WIDTH, WIDTH))
    quantizer.quantize(recipe(), calibration={"input": torch.randn(5, WIDTH)}, progress=False)
    assert quantizer.report.layers[0].tokens == 5


def test_no_warning_where_all_goes_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Quantizer(Attention()).quantize(recipe(), calibration=X, progress=False)


def test_a_singular_second_moment_is_no_failure():
    """Fewer tokens than features: the moment has no inverse, and the damping has to make one."""
    model = Attention()
    try:
        Quantizer(model).quantize(recipe(), calibration=torch.zeros(1, WIDTH), progress=False)
    except QuantizeError as error:
        pytest.fail(str(error))
    assert Stats().second_moment is None


class Masked(nn.Module):
    """As a language model takes its batches: padded, with a mask."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, attention_mask):
        return self.linear(x) * attention_mask[..., None]


def test_padding_does_not_count():
    x, mask = torch.randn(3, 7, WIDTH), torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = mask[2, :5] = 0
    x[mask == 0] = 1e4  # what a model makes of padding may be anything, NaN too
    x[0, 6, 0] = torch.nan
    model = Masked()
    quantizer = Quantizer(model)
    quantizer.quantize(recipe(), calibration=[{"x": x, "attention_mask": mask}], progress=False)
    assert quantizer.report.layers[0].tokens == mask.sum() == 13
    assert quantizer.report.layers[0].output_sqnr > 10


def test_a_mask_of_another_shape_is_left_alone():
    class Pooled(Masked):
        def forward(self, x, attention_mask):
            return self.linear(x.mean(1))

    quantizer = Quantizer(Pooled())
    batch = {"x": torch.randn(3, 7, WIDTH), "attention_mask": torch.ones(3, 7)}
    quantizer.quantize(recipe(), calibration=[batch], progress=False)
    assert quantizer.report.layers[0].tokens == 3


@dataclass
class Condition:
    scale: torch.Tensor
    name: str


class Nested(nn.Module):
    """Takes what some diffusion transformers take: tensors in a dict among its arguments."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, more):
        condition, pair = more["condition"], more["pair"]
        assert condition.name == "size" and type(pair) is list and len(x) == len(condition.scale) == len(pair[1][0])
        return self.q(x * condition.scale + pair[1][0])


def test_tensors_inside_of_what_a_batch_holds_are_cut_and_moved_with_it():
    def batch(rows):
        scale, shift = torch.randn(rows, 1, 1), torch.randn(rows, 1, 1)
        return {
            "x": torch.randn(rows, 3, WIDTH),
            "more": {"condition": Condition(scale, "size"), "pair": [1, (shift,)]},
        }

    run = calibration.make_runner([batch(5), batch(5)], CalibrationSpec(samples=7, tokens=3), progress=False)
    assert run.batches[1]["more"]["pair"][1][0].shape == (2, 1, 1)
    model = Nested()
    stats = calibration.collect(model, {"q": model.q}, {"q": frozenset()}, run)
    assert stats["q"].tokens == 7 * 3
    with pytest.raises(CalibrationError, match=r"batch 0 .*meta"):
        calibration.Runner(run.batches, progress=False, device=torch.device("meta"))(model)
    found = []
    model.register_forward_pre_hook(lambda module, args, kwargs: found.append(kwargs), with_kwargs=True)
    model.to("meta")
    run.run(model, 0)
    (moved,) = found
    assert moved["x"].is_meta and moved["more"]["condition"].scale.is_meta and moved["more"]["pair"][1][0].is_meta
    assert not run.batches[0]["more"]["condition"].scale.is_meta
