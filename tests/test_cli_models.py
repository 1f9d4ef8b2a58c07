"""`qgraft quantize`, `plan`, `inspect` and `eval` on small models in folders, as a user runs them."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qgraft
from qgraft import QuantLinear
from qgraft.quantizer import cli, evaluate
from qgraft.quantizer.interop.huggingface import ModelFolder, load_float, load_quantized

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

LINES = ["the cat sat on the mat", "a dog ran over the hill and far away", "quantize the linear layers of a model"]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def save_tokenizer(folder, template):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    inner.train_from_iterator(LINES, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float models, and a text."""
    base = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
        "bert": transformers.BertModel(transformers.BertConfig(**SMALL)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=1)),
    }
    for name, model in models.items():
        model.save_pretrained(base / name)
        save_tokenizer(base / name, "[CLS] $A" if name == "llama" else "[CLS] $A [SEP]")
    (base / "text.txt").write_text("\n".join(LINES * 30))
    return base


@pytest.fixture
def run(folders, capsys, monkeypatch):
    """Runs a command line in the folder of the models: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folders)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        code = cli.main([str(a) for a in args])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is an error."""

    def load(self, dtype=None):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(ModelFolder, "load", load)


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_shows_every_kind_of_layer_without_reading_weights(run, no_weights):
    code, out, err = run("plan", "llama", "-r", "w4a4_svd")
    assert code == 0 and err == ""
    assert "14 of 15 linear layers" in out and "output head" in out
    assert max(map(len, out.splitlines())) <= 80


def test_every_gives_each_layer_a_line_and_json_is_the_plan(run, no_weights):
    assert run("plan", "llama", "-r", "w8a16", "--every")[1].count("w8a16") == 15 + 1  # and the title
    code, out, _ = run("plan", "llama", "-r", "w8a16", "--json")
    plan = json.loads(out)
    assert code == 0 and len(plan["layers"]) == 15 and plan["recipe"]["name"] == "w8a16"


# -- quantize ----------------------------------------------------------------------------------------------------------


def test_quantize_saves_what_the_library_makes_with_all_that_belongs_to_it(run, tmp_path):
    out = tmp_path / "out"
    code, shown, messages = run("quantize", "llama", "-r", "w8a16", "--out", out)
    assert code == 0
    assert "Plan of recipe w8a16" in shown and "15 layers: " in shown
    assert messages.splitlines()[-1] == f"qgraft: saved {out}"
    names = {file.name for file in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "report.json", "tokenizer.json", "generation_config.json"}
    expected = qgraft.Quantizer(load_float("llama")[0]).quantize("w8a16", progress=False)
    loaded, tokenizer = load_quantized(out)
    ids = tokenizer(LINES[0], return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_calibration_text_reaches_every_kind_of_model(run, tmp_path, model):
    (tmp_path / "r.yaml").write_text("extends: w4a4_svd\ncalibration: {samples: 3, tokens: 20}\n")
    args = ["-r", tmp_path / "r.yaml", "--out", tmp_path / "out", "--calibration", "text.txt"]
    code, _, messages = run("quantize", model, *args)
    assert code == 0 and "with 3 sequences of text" in messages and "warning" not in messages
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {layer["tokens"] for layer in report["layers"]} == {60}
    assert all(layer["output_sqnr"] > 10 for layer in report["layers"])


def test_calibration_text_can_come_from_a_pipe(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat sat")))
    code, _, messages = run("quantize", "bert", "-r", "w4a4_svd", "--calibration", "-", "--out", tmp_path / "out")
    assert code == 0 and "with 1 sequence of text" in messages


def test_dtype_is_that_of_the_model(run, tmp_path):
    run("quantize", "llama", "-r", "w8a16", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert load_quantized(tmp_path / "out")[0].dtype == torch.bfloat16


def test_a_dry_run_shows_the_plan_and_stops_there(run, no_weights, tmp_path):
    code, out, err = run("quantize", "llama", "-r", "w8a16", "--dry-run")
    assert code == 0 and "Plan of recipe w8a16" in out and err == ""
    assert run("quantize", "llama", "-r", "w8a16", "--out", tmp_path / "out", "--dry-run")[0] == 0
    assert not (tmp_path / "out").exists()


FILES = {
    "file": "x",
    "blank": " \n",
    "typo.yaml": "scheme: w8a16\nrulez: []\n",
    "miss.yaml": "scheme: w8a16\nrules: [{match: layers.1.q_prj, skip: small}]\n",
    "none.yaml": "rules: [{match: Linear, skip: none of them}]\n",
}
REFUSALS = {
    "out is a file": ("--out", "{}/file", "exists and is no folder"),
    "out is below a file": ("--out", "{}/file/out", "is no folder"),
    "out holds something else": ("--out", "{}", "something else than a qgraft checkpoint"),
    "out is the model": ("--out", "llama", "something else than a qgraft checkpoint"),
    "no calibration file": ("--calibration", "{}/nowhere", "nowhere: No such file"),
    "blank calibration": ("--calibration", "{}/blank", "blank: holds no text"),
    "typo in the recipe": ("-r", "{}/typo.yaml", "did you mean 'rules'?"),
    "rule without a match": ("-r", "{}/miss.yaml", "matches no linear layer"),
    "nothing to do": ("-r", "{}/none.yaml", "quantizes no layer of this model"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_can_be_refused_is_refused_before_the_weights_are_read(run, no_weights, tmp_path, case):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    option, value, message = REFUSALS[case]
    defaults = ["--recipe", "w8a16", "--out", tmp_path / "new"]
    code, _, err = run("quantize", "llama", *defaults, option, value.format(tmp_path))
    assert code == 1 and message in err and err.startswith("qgraft: error: ")
    assert not (tmp_path / "new").exists()


def test_calibration_without_a_tokenizer_is_refused(run, no_weights, tmp_path, folders):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folders / "llama" / "config.json").read_bytes())
    args = ["-r", "w4a4_svd", "--out", tmp_path / "out", "--calibration", "text.txt"]
    code, _, err = run("quantize", tmp_path / "bare", *args)
    assert code == 1 and "has no tokenizer" in err


def test_ctrl_c_while_quantizing_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def interrupt(self, weight, stats=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(qgraft.W8A16Linear, "quantize", interrupt)
    code, _, err = run("quantize", "llama", "-r", "w8a16", "--out", tmp_path / "out")
    assert code == 130 and "qgraft: interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_after_the_first_layer_says_that_the_same_command_goes_on(run, tmp_path, monkeypatch):
    real, calls = qgraft.W8A16Linear.quantize, []

    def interrupt(self, *args, **options):
        calls.append(self)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    monkeypatch.setattr(qgraft.W8A16Linear, "quantize", interrupt)
    code, _, err = run("quantize", "llama", "-r", "w8a16", "--out", tmp_path / "out")
    assert code == 130 and "the same command goes on from there" in err
    monkeypatch.setattr(qgraft.W8A16Linear, "quantize", real)
    code, _, err = run("quantize", "llama", "-r", "w8a16", "--out", tmp_path / "out")
    assert code == 0 and "going on from an interrupted run" in err


def test_quantize_without_the_data_that_would_help_says_so(run, tmp_path):
    out = run("quantize", "llama", "-r", "w4a16", "--out", tmp_path / "out")[1]
    assert "worked from the weights alone" in " ".join(out.split())


# -- allocate ----------------------------------------------------------------------------------------------------------


def test_allocate_writes_a_recipe_within_the_budget_that_plan_and_quantize_take(run, tmp_path):
    pytest.importorskip("scipy")
    mine, numbers = tmp_path / "mine.yaml", tmp_path / "mine.json"
    chosen = ("-c", "w4a16", "-c", "w8a16", "--rank", "4", "--calibration", "text.txt", "--samples", "3")
    args = ("llama", "--budget", "7.2 bits", *chosen, "--out", mine, "--json", numbers)
    code, shown, messages = run("allocate", *args)
    assert code == 0 and "What a budget buys" in shown and f"saved {mine}" in messages.replace("\n", "")
    found = json.loads(numbers.read_text())
    assert found["bits"] <= 7.2 and found["metric"].startswith("KL")
    assert json.loads(run("plan", "llama", "-r", mine, "--json")[1])["bytes_after"] == found["bytes"]


@pytest.mark.parametrize(
    "change, message",
    [
        (("--budget", "7 apples"), "a budget is written"),
        (("-c", "w4a99"), "w4a99"),
        (("--out", "mine.txt"), "ends in .yaml"),
        (("--calibration", "none.txt"), "none.txt"),
    ],
)
def test_allocate_refuses_before_the_weights_are_read(run, no_weights, tmp_path, change, message):
    good = ["--budget", "7 bits", "-c", "w8a16", "--calibration", "text.txt", "--out", tmp_path / "mine.yaml"]
    code, _, messages = run("allocate", "llama", *good, *change)
    assert code == 1 and message in messages and not (tmp_path / "mine.yaml").exists()


def test_allocate_misses_its_solver_before_the_weights_are_read(run, no_weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    args = ["--budget", "7 bits", "-c", "w8a16", "--calibration", "text.txt", "--out", tmp_path / "mine.yaml"]
    code, _, messages = run("allocate", "llama", *args)
    assert code == 1 and "qgraft[allocate]" in messages and "loading" not in messages


# -- inspect and eval --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(folders):
    """llama and bert quantized by the command line."""
    for name in ("llama", "bert"):
        code = cli.main(["quantize", str(folders / name), "-r", "w8a16", "--out", str(folders / f"{name}-w8a16")])
        assert code == 0


def test_inspect_tells_schemes_bits_sizes_and_errors_from_the_files_alone(run, quantized, monkeypatch):
    monkeypatch.setattr(QuantLinear, "__init__", None)  # no layer is built
    code, out, err = run("inspect", "llama-w8a16")
    assert code == 0 and err == ""
    assert "LlamaForCausalLM" in out and "15 quantized layers of 8.4" in out
    assert "in 1 file, whose checksums are right" in out
    assert max(map(len, out.splitlines())) <= 80
    assert run("inspect", "llama-w8a16", "--every")[1].count("w8a16 ") == 15
    found = json.loads(run("inspect", "llama-w8a16", "--json")[1])
    first = found["layers"][0]
    assert first["scheme"] == "w8a16" and first["shape"] == [64, 64] and first["report"]["weight_error"] > 0
    assert first["bits_per_weight"] == pytest.approx(8 + 32 / 64), "a scale of 32 bits for each 64 weights"
    tensors = load_file("llama-w8a16/model.safetensors").values()
    assert found["bytes"] == sum(t.numel() * t.element_size() for t in tensors)


def test_inspect_finds_a_damaged_file(run, quantized, tmp_path, folders):
    for file in (folders / "llama-w8a16").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    code, out, err = run("inspect", tmp_path)
    assert code == 1 and out == "" and "the file is damaged" in err
    code, _, err = run("inspect", "llama")
    assert code == 1 and "not a qgraft checkpoint" in err


def test_eval_gives_the_perplexity_of_both_models_and_their_ratio(run, quantized):
    code, out, err = run("eval", "llama-w8a16", "--original", "llama", "--text", "text.txt", "--window", "32")
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    (_, _, first, one), (_, _, second, ratio) = rows
    assert one == "1" and float(ratio) == pytest.approx(float(second) / float(first), abs=1e-3)
    model, tokenizer = load_float("llama")
    tokens = torch.tensor(tokenizer(Path("text.txt").read_text())["input_ids"])
    assert float(first) == pytest.approx(evaluate.perplexity(model, tokens, 32), abs=0.01)
    assert err.splitlines() == ["qgraft: loading llama", "qgraft: loading llama-w8a16"]


def test_eval_of_a_float_model_needs_no_other_and_takes_text_from_a_pipe(run, folders, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folders / "text.txt").read_bytes())))
    code, out, err = run("eval", "llama", "--limit", "50")
    assert code == 0 and "50 tokens in windows of 64" in out
    assert "warning: the model takes 64 tokens at most" in err


def test_eval_of_an_encoder_compares_vectors_of_lines(run, quantized):
    code, out, _ = run("eval", "bert-w8a16", "--original", "bert", "--text", "text.txt", "--limit", "100")
    assert code == 0 and 0.999 < float(out.splitlines()[4].split("│")[-2]) <= 1
    assert "vectors of 16 lines" in out, "a batch is the least"


def test_eval_of_an_encoder_without_the_original_is_wrong_usage(run):
    code, out, err = run("eval", "bert", "--text", "text.txt")
    assert code == 2 and out == "" and "give --original" in err
    assert run("eval", "t5", "--original", "t5", "--text", "text.txt")[0] == 0


def test_eval_against_another_model_says_that_it_is_another(run, folders, tmp_path):
    wider = transformers.BertModel(transformers.BertConfig(**{**SMALL, "hidden_size": 32}))
    wider.save_pretrained(tmp_path)
    code, _, err = run("eval", "bert", "--original", tmp_path, "--text", "text.txt")
    assert code == 1 and "was not made from that" in err
