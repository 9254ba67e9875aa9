"""What a quantized model loses against the original, token by token, and the figures that the field reads from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allocator.evaluate.divergence import kl_by_token, surprise_by_token

__all__ = ["Reference", "TokenLosses", "paired_interval"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class TokenLosses:
    """Of every position that predicts a token, `[S, T-1]`: `kl` of the original's prediction from this one and `nll` of
    the text in nats, and whether both rank the same token first."""

    kl: np.ndarray
    nll: np.ndarray
    same_top: np.ndarray

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, kl=self.kl, nll=self.nll, same_top=self.same_top)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "TokenLosses":
        with np.load(path) as stored:
            return cls(stored["kl"], stored["nll"], stored["same_top"])

    def summary(self) -> dict[str, float]:
        """KL mean, median, 90 % and 99.9 % quantile (nats), top-1 agreement, perplexity; `kl_error`: the standard error
        of the mean, sequences as the sample."""
        by_sequence = self.kl.mean(1, dtype=np.float64)
        return {
            "kl": float(by_sequence.mean()),
            "kl_error": float(by_sequence.std(ddof=1) / len(by_sequence) ** 0.5),
            "kl_median": float(np.quantile(self.kl, 0.5)),
            "kl_p90": float(np.quantile(self.kl, 0.9)),
            "kl_p999": float(np.quantile(self.kl, 0.999)),
            "top1": float(self.same_top.mean()),
            "perplexity": float(np.exp(self.nll.mean(dtype=np.float64))),
        }


def paired_interval(ours: TokenLosses, theirs: TokenLosses, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of mean KL of `ours` over that of `theirs`: the same sequences are drawn for both."""
    a, b = ours.kl.mean(1, dtype=np.float64), theirs.kl.mean(1, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(a), size=(_RESAMPLES, len(a)))
    ratios = a[rows].mean(1) / b[rows].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


class Reference:
    """The original model on `token_ids` (int64 `[S, T]`): its last hidden states `[S, T, D]` are kept, predictions are
    made of them again for every comparison."""

    def __init__(self, token_ids: Tensor, states: Tensor, head: nn.Module) -> None:
        self.token_ids, self.states, self._head = token_ids, states, head

    @classmethod
    def of(cls, original: Any, token_ids: Tensor) -> "Reference":
        """Run the original, a causal language model, on the text."""
        with torch.inference_mode():
            states = torch.cat([_last_states(original, rows[None]) for rows in token_ids])
        return cls(token_ids, states, original.lm_head)

    def losses(self, model: Any) -> TokenLosses:
        """What `model`, a causal language model of the same tokens, loses on the text."""
        kl, nll, same = [], [], []
        with torch.inference_mode():
            for rows, states in zip(self.token_ids, self.states, strict=True):
                theirs = self._head(states[None, :-1]).float().log_softmax(-1)
                ours = model.lm_head(_last_states(model, rows[None]))[:, :-1].float().log_softmax(-1)
                kl.append(kl_by_token(theirs, ours))
                nll.append(surprise_by_token(ours, rows[None]))
                same.append(theirs.argmax(-1) == ours.argmax(-1))
        return TokenLosses(*(torch.cat(part).numpy() for part in (kl, nll, same)))


def _last_states(model: Any, rows: Tensor) -> Tensor:
    states: Tensor = model.model(rows, use_cache=False).last_hidden_state
    return states
