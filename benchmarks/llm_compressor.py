"""llm-compressor's GPTQ W4A16 as an entrant. Its releases ask for one version of transformers, which is seldom ours,
so it has an environment of its own:

    make .venv-llmcompressor/.ready
    .venv-llmcompressor/bin/python -m qgraft.benchmarks.accuracy --only none --peers llmcompressor --json FILE
"""

import contextlib
import importlib.metadata
import os
import tempfile
from typing import Any

import torch
from torch import nn

from . import entrants

GROUP = 64  # as ours have; its preset W4A16 has 128, which not all widths here are a multiple of
BITS = 4 + 16 / GROUP  # codes, and one 16-bit scale a group; symmetric


class LLMCompressor(entrants.Entrant):
    """GPTQ as its documentation shows: one `oneshot` on the whole model, calibrated with the same data as ours."""

    library = "llmcompressor"
    name = "llmcompressor GPTQ W4A16"
    calibrated = True

    def absent(self) -> str | None:
        try:
            importlib.metadata.version("llmcompressor")
        except importlib.metadata.PackageNotFoundError:
            return "llmcompressor is not installed here (make .venv-llmcompressor/.ready)"
        return None

    def make(self, model: nn.Module, calibration: entrants.Batches) -> entrants.Made:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier

        if "input_ids" not in calibration[0]:
            raise NotImplementedError("its calibration takes text")
        names = entrants.covered(model, "w4a16")
        count = sum(model.get_submodule(name).weight.numel() for name in names)
        size = sum(t.numel() * t.element_size() for t in {id(p): p for p in model.parameters()}.values())
        rows = []
        for batch in calibration:
            masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            texts = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
            rows += [{"input_ids": text, "attention_mask": [1] * len(text)} for text in texts]
        targets = [f"re:{name.replace('.', '[.]')}$" for name in names]
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP)  # else as in its preset
        scheme = QuantizationScheme(targets=targets, weights=weights)
        with (
            tempfile.TemporaryDirectory() as folder,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            # It reads the configuration again from where the model came from, which a GGUF file is not good for, and
            # takes a model whose file was quantized for quantized.
            vars(model.config).pop("quantization_config", None)
            model.config.save_pretrained(folder)
            model.config._name_or_path = model.name_or_path = folder
            oneshot(
                model=model,
                processor=_no_tokenizer(),
                dataset=Dataset.from_list(rows),
                recipe=GPTQModifier(config_groups={"group_0": scheme}),
                num_calibration_samples=len(rows),
                max_seq_length=max(len(row["input_ids"]) for row in rows),
            )
        # The layers stay nn.Linear with rounded float weights: what they would take is counted, not seen.
        with torch.no_grad():
            return entrants.Made(model, BITS, int(size - 4 * count + BITS * count / 8))


def _no_tokenizer() -> Any:
    """What stands in for one: the texts are tokens already, and a model from a GGUF file has no folder to look in."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0})), pad_token="")
