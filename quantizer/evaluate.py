"""How good a model is, in one number: perplexity of a language model, cosine of an encoder's vectors."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, window: int = 512, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood, in nats per predicted token. Lower is better; 1 is perfect.

    model: a causal language model: (1, T) token ids -> logits (1, T, V), as a tensor or as `.logits`.
    tokens: (T,) token ids, cut in windows of `window` that do not overlap. The first of each window is given,
    the others are predicted; a last window of one token predicts nothing and is left out.
    Infinite where the mean is too large to be exponentiated, NaN where a logit is.
    """
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < 2:
        raise ValueError(f"tokens must be at least 2 ids in one dimension, got {tuple(tokens.shape)} {tokens.dtype}")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, one given and one predicted, got {window}")
    device = _device_of(model)
    windows = [w for w in tokens.long().split(window) if len(w) > 1]
    total, count = torch.zeros((), dtype=torch.float64), 0
    with _eval_mode(model):
        for ids in tqdm(windows, "perplexity", disable=None if progress else True, leave=False):
            ids = ids.to(device)
            output = model(ids[None])
            logits = getattr(output, "logits", output)[0, :-1]  # (t - 1, V)
            loss = F.cross_entropy(logits.float(), ids[1:].to(logits.device), reduction="none")
            total += loss.double().sum().cpu()
            count += len(loss)
    return (total / count).exp().item()


@torch.no_grad()
def embed(model: nn.Module, batches: Iterable[Mapping[str, Any]], progress: bool = False) -> Tensor:
    """A unit vector for each sequence, the mean of its tokens' last hidden states: (S, H) float32 on CPU.

    model: an encoder: keywords of a batch -> (B, T, H), as a tensor or as `.last_hidden_state`.
    batches: keywords for the model, such as a tokenizer gives: tensors (B, T). `attention_mask` tells tokens
    (1) from padding (0); without it all are tokens.
    """
    device = _device_of(model)
    vectors = []
    with _eval_mode(model):
        for batch in tqdm(batches, "embed", disable=None if progress else True, leave=False):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            output = model(**batch)
            hidden = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
            if hidden is None:
                raise TypeError(f"{type(model).__name__} gives no last_hidden_state: embed() needs an encoder")
            hidden = hidden.float()
            mask = batch.get("attention_mask")
            mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)  # (B, T)
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)  # (B, H)
            vectors.append(F.normalize(mean, dim=-1).cpu())
    if not vectors:
        raise ValueError("no batches to embed")
    return torch.cat(vectors)


def cosine_to(reference: Tensor, other: Tensor) -> float:
    """Mean cosine between the rows of two tensors (S, H): 1 where they point the same way."""
    if reference.ndim != 2 or reference.shape != other.shape:
        raise ValueError(f"both must have the same shape (S, H), got {tuple(reference.shape)} and {tuple(other.shape)}")
    # In float64, because near 1 a float32 has only seven digits for what is of interest, 1 - cosine.
    return F.cosine_similarity(reference.double().cpu(), other.double().cpu(), dim=-1).mean().item()


def _device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, and each module's flag back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
