"""What the demo does with a model, whichever of the two it is: measure quality and speed, show it at work."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.quantizer import evaluate

from . import models

WINDOW = 512
CALIBRATION_TOKENS = 512


@dataclass(frozen=True)
class Speed:
    """One way of using the model: `run` returns the seconds that the model took for `tokens` tokens."""

    name: str
    tokens: int
    run: Callable[[nn.Module], float]
    rounds: tuple[int, int]


class Subject(ABC):
    """A float model, its data, and what there is to measure on it and on those that are made from it."""

    name: str
    quality_name: str
    quality_format: str
    setting: str  # in words: what quality was measured on, and what calibration saw
    question: str = ""  # what `sample` answers
    model: nn.Module
    calibration: list[dict[str, Any]]
    speeds: tuple[Speed, ...]

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        return models.skeleton(self.model, dtype)

    def in_dtype(self, dtype: torch.dtype) -> nn.Module:
        return models.in_dtype(self.model, dtype)

    @abstractmethod
    def quality(self, model: nn.Module) -> float:
        """Lower is better."""

    @abstractmethod
    def probe(self, model: nn.Module) -> Tensor:
        """What the model computes for some fixed input, to compare bit by bit."""

    @abstractmethod
    def sample(self, model: nn.Module) -> str:
        """Something that a person can look at; "" if there is nothing."""


class LanguageModel(Subject):
    """SmolLM2-135M: perplexity on news text that no calibration saw, speed of decoding and of prefill."""

    name = "SmolLM2-135M"
    quality_name = "perplexity"
    quality_format = "{:.2f}"
    question = "What is gravity? Answer in one sentence."

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: list[str],
        evaluation: list[str],
        *,
        windows: int,
        steps: int = 24,
        rounds: tuple[int, int] = (3, 7),
    ):
        self.model, self.tokenizer, self.steps = model, tokenizer, steps
        # Calibration looks at what goes into the layers: logits of all tokens would be work for nothing.
        self.calibration = [{**batch, "logits_to_keep": 1} for batch in _encode(tokenizer, calibration)]
        text = tokenizer("\n\n".join(evaluation), return_tensors="pt")["input_ids"][0]
        self.tokens = text[: windows * WINDOW]
        self.setting = (
            f"Perplexity over {windows} windows of {WINDOW} tokens of news text; calibration, where there "
            f"is any, saw {len(calibration)} other documents. Decoding is greedy, batch 1, {steps} tokens "
            f"with a cache; prefill is one window of {WINDOW} tokens."
        )
        messages = [{"role": "user", "content": self.question}]
        self.prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        self.speeds = (
            Speed("decode", steps, lambda m: self.decode(m)[1], rounds),
            Speed("prefill", WINDOW, self._prefill, rounds),
        )

    def quality(self, model: nn.Module) -> float:
        return evaluate.perplexity(model, self.tokens, window=WINDOW)

    @torch.no_grad()
    def probe(self, model: nn.Module) -> Tensor:
        return model(self.tokens[None, :64]).logits

    def sample(self, model: nn.Module) -> str:
        tokens, _ = self.decode(model)
        end = self.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        return " ".join(self.tokenizer.decode(tokens).split())

    @torch.no_grad()
    def decode(self, model: nn.Module) -> tuple[list[int], float]:
        """The most likely tokens after the prompt, one by one with a cache of keys and values, and the
        seconds from the first of them to the last: the prompt is not counted."""
        out = model(self.prompt, use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        for _ in range(self.steps):
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens, time.perf_counter() - start

    @torch.no_grad()
    def _prefill(self, model: nn.Module) -> float:
        start = time.perf_counter()
        model(self.tokens[None, :WINDOW], use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


class SentenceEncoder(Subject):
    """all-MiniLM-L6-v2: how far the sentence vectors turn away from those of the float32 model."""

    name = "MiniLM-L6-v2"
    quality_name = "1 - cos"
    quality_format = "{:.5f}"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        calibration: list[str],
        evaluation: list[str],
        *,
        sentences: int,
        batch: int = 32,
        rounds: tuple[int, int] = (7, 30),
    ):
        self.model = model
        self.calibration = _encode(tokenizer, calibration)
        self.sentences = _first_sentences(evaluation, sentences)
        self.setting = (
            f"1 - mean cosine to the float32 vectors of {len(self.sentences)} sentences of news text; "
            f"calibration, where there is any, saw {len(calibration)} other documents. Speed of one sentence and "
            f"of {batch} in a batch, padding not counted."
        )
        self.batches = [
            dict(tokenizer(self.sentences[i : i + batch], padding=True, truncation=True, return_tensors="pt"))
            for i in range(0, len(self.sentences), batch)
        ]
        one = dict(tokenizer(self.sentences[0], return_tensors="pt"))
        many = self.batches[0]
        tokens = int(many["attention_mask"].sum())
        self.speeds = (
            Speed("batch-1", one["input_ids"].numel(), lambda m: _seconds(m, one), rounds),
            Speed(f"batch-{batch}", tokens, lambda m: _seconds(m, many), rounds),
        )
        self.reference = evaluate.embed(model, self.batches)

    def quality(self, model: nn.Module) -> float:
        # abs: rounding can take a cosine of 1 a little above it.
        return abs(1 - evaluate.cosine_to(self.reference, evaluate.embed(model, self.batches)))

    @torch.no_grad()
    def probe(self, model: nn.Module) -> Tensor:
        return model(**self.batches[0]).last_hidden_state

    def sample(self, model: nn.Module) -> str:
        return ""


def _encode(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    options = {"truncation": True, "max_length": CALIBRATION_TOKENS, "return_tensors": "pt"}
    return [dict(tokenizer(text, **options)) for text in texts]


def _first_sentences(documents: list[str], count: int) -> list[str]:
    """The first sentence of each document, then the second of each, and so on, until there are `count`."""
    split = [[s.strip() for s in document.split(". ") if len(s.split()) > 4] for document in documents]
    longest = max(map(len, split))
    return [sentences[i] for i in range(longest) for sentences in split if i < len(sentences)][:count]


@torch.no_grad()
def _seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    model(**batch)
    return time.perf_counter() - start
