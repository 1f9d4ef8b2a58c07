"""The four models that accuracy is measured on: how each is loaded and calibrated, and what counts as its loss.

    smollm2  a language model     perplexity on news and on Wikipedia as ratios to float32, KL divergence to float32
    minilm   a sentence encoder   1 - cosine to the float32 vectors, rank correlation of all similarities
    dit      a diffusion model    relative error of the output; built from a seed (seeded.py)
    vit      a vision model       the same

Calibration and evaluation share no document (texts.py) and no seed.
"""

import getpass
import hashlib
import importlib.metadata
import math
import os
import tempfile
from abc import ABC, abstractmethod
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qgraft.quantizer import evaluate

from . import models, seeded, texts
from .texts import CALIBRATION, EVALUATION, SOURCES

WINDOW, WINDOWS = 512, 16  # tokens; of each source, to measure on
SAMPLES = 64  # sequences or images of calibration; half of the texts from each source
SENTENCES = 128  # of each source, to measure on
TOGETHER = 8  # sentences in a batch of calibration: what the encoder will see, not whole documents
SEEDS = {CALIBRATION: 1, EVALUATION: 2}
IMAGES = 16  # to measure on

Scores = dict[str, float]


class Yardstick(ABC):
    """A float32 model and what is measured on those made from it.

    metrics: the names in `score`'s result. main: the one that targets are set for; smaller is better.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    main: str
    setting: str

    @abstractmethod
    def load(self) -> nn.Module:
        """A new float32 model, in eval mode."""

    @abstractmethod
    def calibration(self, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
        """Batches of one sequence or image, or of a few sentences, `samples` in all, none of them measured on."""

    @abstractmethod
    def score(self, model: nn.Module) -> Scores:
        """What `model` loses against the float32 one."""


class LanguageModel(Yardstick):
    """SmolLM2-135M-Instruct. The float32 model's distributions are computed once and kept in the temporary folder."""

    name, title = "smollm2", "SmolLM2-135M"
    metrics = ("ratio", "ratio_news", "ratio_wikipedia", "kl", "perplexity")
    main = "ratio"
    setting = (
        f"{WINDOWS} windows of {WINDOW} tokens each of news and Wikipedia; ratio: perplexity over both, divided by "
        "that of float32; kl: mean over all tokens of the KL divergence from the float32 distribution, in nats"
    )

    def load(self) -> nn.Module:
        return models.smollm2()[0]

    def calibration(self, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
        halves = [samples - samples // 2, samples // 2]
        ids = [
            texts.windows(self._tokenizer, source, CALIBRATION, count, WINDOW)
            for source, count in zip(SOURCES, halves, strict=True)
            if count
        ]
        # Calibration looks at what goes into the layers: logits of all tokens would be work for nothing.
        return [{"input_ids": row[None], "logits_to_keep": 1} for row in torch.cat(ids)]

    @torch.no_grad()
    def score(self, model: nn.Module) -> Scores:
        losses, divergences = [], []
        with self._reference() as (log_p_of, float_losses):
            for i, ids in enumerate(self._windows):
                log_p, log_q = log_p_of(i).float(), _log_probabilities(model, ids)  # (T - 1, V)
                losses.append(F.nll_loss(log_q, ids[1:], reduction="none"))
                divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        ours, theirs = torch.stack(losses).double(), float_losses.double()  # (2 * WINDOWS, T - 1)
        excess = (ours - theirs).mean(1).reshape(len(SOURCES), -1).mean(1)
        return {
            "ratio": _exp(excess.mean()),
            **{f"ratio_{source}": _exp(mean) for source, mean in zip(SOURCES, excess, strict=True)},
            "kl": torch.stack(divergences).double().mean().item(),
            "perplexity": _exp(ours.mean()),
        }

    @cached_property
    def _tokenizer(self) -> Any:
        return models.smollm2_tokenizer()

    @cached_property
    def _windows(self) -> Tensor:
        """News first: (2 * WINDOWS, WINDOW)."""
        return torch.cat([texts.windows(self._tokenizer, s, EVALUATION, WINDOWS, WINDOW) for s in SOURCES])

    def _reference(self) -> "_Distributions":
        """1.6 GB in float16, which is exact to 0.1 % where the probability is: near a logarithm of 0."""
        # What the numbers depend on: the text, the weights' file, and who reads it.
        key = hashlib.sha256(self._windows.numpy().tobytes())
        key.update(models.smollm2_file().read_bytes()[:1_000_000])
        key.update(f"{torch.__version__} {importlib.metadata.version('transformers')}".encode())
        folder = Path(tempfile.gettempdir(), f"qgraft-accuracy-{getpass.getuser()}")
        path = folder / f"{key.hexdigest()[:16]}.safetensors"
        if not path.exists():
            model, tensors, losses = self.load(), {}, []
            for i, ids in enumerate(self._windows):
                log_p = _log_probabilities(model, ids)
                losses.append(F.nll_loss(log_p, ids[1:], reduction="none"))
                tensors[str(i)] = log_p.half()
            folder.mkdir(mode=0o700, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file({**tensors, "losses": torch.stack(losses)}, part)
            part.replace(path)
        return _Distributions(path)


class _Distributions:
    """The file, open: a function from the number of a window to its (T - 1, V), and the losses (windows, T - 1)."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self._file = safe_open(self.path, "pt")
        file = self._file.__enter__()
        return (lambda i: file.get_tensor(str(i))), file.get_tensor("losses")

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


class SentenceEncoder(Yardstick):
    """all-MiniLM-L6-v2."""

    name, title = "minilm", "MiniLM-L6"
    metrics = ("one_minus_cosine", "rank_correlation")
    main = "one_minus_cosine"
    setting = (
        f"{SENTENCES} sentences each of news and Wikipedia; one_minus_cosine: to the float32 vectors, mean; "
        "rank_correlation: Spearman's, of the similarities of all pairs, with those of float32"
    )

    def load(self) -> nn.Module:
        return models.minilm()[0]

    def calibration(self, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
        halves = zip(SOURCES, (samples - samples // 2, samples // 2), strict=True)
        found = [s for source, n in halves for s in texts.sentences(source, CALIBRATION, n * TOGETHER)]
        return self._tokenized(found, TOGETHER)

    def score(self, model: nn.Module) -> Scores:
        from scipy.stats import spearmanr

        theirs, ours = self._reference, evaluate.embed(model, self._batches)
        above = torch.triu_indices(len(ours), len(ours), 1)
        pairs = [(v @ v.T)[above[0], above[1]].numpy() for v in (theirs, ours)]
        finite = bool(torch.isfinite(ours).all())
        return {
            # abs: rounding can take a cosine of 1 a little above it.
            "one_minus_cosine": abs(1 - evaluate.cosine_to(theirs, ours)),
            "rank_correlation": float(spearmanr(*pairs).statistic) if finite else math.nan,
        }

    @cached_property
    def _tokenizer(self) -> Any:
        return models.minilm()[1]

    @cached_property
    def _batches(self) -> list[dict[str, Tensor]]:
        return self._tokenized([s for source in SOURCES for s in texts.sentences(source, EVALUATION, SENTENCES)], 32)

    def _tokenized(self, sentences: list[str], together: int) -> list[dict[str, Tensor]]:
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        starts = range(0, len(sentences), together)
        return [dict(self._tokenizer(sentences[i : i + together], **options)) for i in starts]

    @cached_property
    def _reference(self) -> Tensor:
        return evaluate.embed(self.load(), self._batches)


class Seeded(Yardstick):
    """A model without trained weights: the relative error of its output."""

    metrics = ("relative_error",)
    main = "relative_error"

    def __init__(self, name: str, title: str, make: Any, batches: Any, what: str):
        self.name, self.title, self._make, self._batches = name, title, make, batches
        self.setting = f"{IMAGES} {what}; relative_error: |y - y_float32| / |y_float32| over all of them"

    def load(self) -> nn.Module:
        return self._make()

    def calibration(self, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
        return self._batches(samples, SEEDS[CALIBRATION])

    def score(self, model: nn.Module) -> Scores:
        error = torch.linalg.vector_norm(self._outputs(model) - self._reference, dtype=torch.float64)
        return {"relative_error": (error / torch.linalg.vector_norm(self._reference, dtype=torch.float64)).item()}

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> Tensor:
        return torch.cat([model(**batch)[0].float() for batch in self._batches(IMAGES, SEEDS[EVALUATION])])

    @cached_property
    def _reference(self) -> Tensor:
        return self._outputs(self.load())


@cache
def yardsticks() -> dict[str, Yardstick]:
    """All of them by name; each loads what it needs when it is asked."""
    found = (
        LanguageModel(),
        SentenceEncoder(),
        Seeded("dit", "PixArt, seeded", seeded.dit, seeded.latents, "latents at random steps, with text"),
        Seeded("vit", "ViT, seeded", seeded.vit, seeded.images, "images"),
    )
    return {item.name: item for item in found}


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """(T,) token ids -> (T - 1, V) float32 logarithms of the probabilities of what follows each but the last."""
    return F.log_softmax(model(ids[None]).logits[0, :-1].float(), dim=-1)


def _exp(mean: Tensor) -> float:
    return mean.exp().item()
