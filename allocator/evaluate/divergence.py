"""KL divergence of a model's next-token distribution from the original's, and perplexity, over sequences."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.finite import require_finite
from allocator.run.progress import Progress, silent

__all__ = ["Divergence", "kl_by_token", "measure_divergence", "surprise_by_token"]

_LARGEST_EXPONENT = 700


@dataclass(frozen=True)
class Divergence:
    """kl: mean over tokens of KL(original || model) in nats; perplexity and original_perplexity on the same tokens."""

    kl: float
    perplexity: float
    original_perplexity: float
    tokens: int


def kl_by_token(original: Tensor, model: Tensor) -> Tensor:
    """KL(original || model) of log probabilities `[..., V]`: `[...]`, nats."""
    return (original.exp() * (original - model)).sum(-1)


def surprise_by_token(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """-log p of each next token: log probabilities `[s, T-1, V]` and token ids int64 `[s, T]` to `[s, T-1]`, nats."""
    targets = token_ids[:, 1:].unsqueeze(-1).to(logprobs.device)
    return -logprobs.gather(-1, targets).squeeze(-1)


def measure_divergence(
    original: Any, model: Any, token_ids: Tensor, batch: int = 4, progress: Progress = silent
) -> Divergence:
    """Compare two causal language models on int64 `[sequences, length]`, every position but the last.

    All of it is one unit of the step that `progress` is at. Raises InputError when logits are not finite.
    """
    kl = loss = original_loss = 0.0
    tokens = token_ids.shape[0] * (token_ids.shape[1] - 1)
    with torch.inference_mode():
        for rows in torch.split(token_ids, batch):
            ours, theirs = (_logprobs(of, rows, name) for of, name in ((model, "changed"), (original, "original")))
            kl += _total(kl_by_token(theirs, ours))
            loss += _total(surprise_by_token(ours, rows))
            original_loss += _total(surprise_by_token(theirs, rows))
            progress.advance(len(rows) / len(token_ids))
    return Divergence(kl / tokens, _perplexity(loss / tokens), _perplexity(original_loss / tokens), tokens)


def _logprobs(model: Any, rows: Tensor, name: str) -> Tensor:
    logits: Tensor = model(rows).logits[:, :-1].float()
    require_finite(logits, f"logits of the {name} model")
    return logits.log_softmax(-1)


def _total(of_tokens: Tensor) -> float:
    return float(of_tokens.sum(dtype=torch.float64))


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf
