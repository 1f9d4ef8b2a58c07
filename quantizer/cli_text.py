"""Text files as what models take: token ids, calibration sequences, batches of lines."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import QGraftError

# How much text to encode for a wanted number of tokens, at first; most tokens are shorter.
CHARACTERS_PER_TOKEN = 8
LINES_PER_BATCH = 16


def read_text(path: str) -> str:
    """The text of a UTF-8 file, of stdin for "-". OSError or QGraftError if there is none."""
    name = "standard input" if path == "-" else path
    if path == "-":
        raw = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QGraftError(f"{name}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise QGraftError(f"{name}: holds no text")
    return text


def token_ids(tokenizer: Any, text: str, limit: int | None = None, special: bool = True) -> Tensor:
    """The first `limit` token ids of a text, (T,) int64; `special`: with those that begin and end a text."""
    characters = len(text) if limit is None else limit * CHARACTERS_PER_TOKEN
    while True:
        ids = tokenizer(text[:characters], add_special_tokens=special, verbose=False)["input_ids"]
        if characters >= len(text) or len(ids) > limit:
            return torch.tensor(ids[:limit], dtype=torch.long)
        characters *= 2


def sequences(tokenizer: Any, text: str, tokens: int, samples: int) -> list[Tensor]:
    """The text in pieces of at most `tokens` tokens each, at most `samples` of them: (1, T) int64 each.

    Each piece begins and ends as the model is used to, with a class token for instance.
    """
    before, after = _specials(tokenizer)
    inside = max(1, tokens - len(before) - len(after))
    ids = token_ids(tokenizer, text, limit=inside * samples, special=False)
    return [torch.cat((before, piece, after))[None] for piece in ids.split(inside)]


def _specials(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before and after a text."""
    bare = token_ids(tokenizer, "a", special=False)
    full = token_ids(tokenizer, "a")
    for start in range(len(full) - len(bare) + 1):
        if len(bare) and torch.equal(full[start : start + len(bare)], bare):
            return full[:start], full[start + len(bare) :]
    return full[:0], full[:0]


def line_batches(tokenizer: Any, text: str, tokens: int, limit: int | None) -> Iterator[dict[str, Tensor]]:
    """The lines of a text in padded batches, each cut at `tokens` tokens, until `limit` tokens are used."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    size = LINES_PER_BATCH if tokenizer.pad_token is not None else 1
    used = 0
    for start in range(0, len(lines), size):
        if limit is not None and used >= limit:
            return
        batch = tokenizer(
            lines[start : start + size],
            padding=size > 1,
            truncation=True,
            max_length=tokens,
            return_tensors="pt",
        )
        used += int(batch["attention_mask"].sum())
        yield dict(batch)


def longest(tokenizer: Any, config: Any, wanted: int) -> int:
    """`wanted`, or less where the model takes no sequence as long as that."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or wanted
    return min(wanted, positions, tokenizer.model_max_length)
