"""Text that a model writes itself: sampled from its own distribution, and from nothing else.

Not with `generate` of transformers: that takes penalties, filters, beams and stop strings from generation_config.json,
which bend the distribution that is to be calibrated on. Only the token that
ends a text is left out, as sequences have one length.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.calibration.tokenizer import added_before
from allocator.blocks.finite import require_finite
from allocator.blocks.hf_model import has_tokenizer, open_model, open_tokenizer
from allocator.run.progress import Progress, silent

__all__ = ["write_tokens"]


def write_tokens(folder: Path, sequences: int, length: int, seed: int, progress: Progress = silent) -> Tensor:
    """Token ids, int64 `[sequences, length]`, drawn at temperature 1. The same seed gives the same ones.

    Raises InputError when the model cannot be loaded or its logits are not finite.
    """
    progress.begin("opening the model")
    model = open_model(folder)
    config = model.config.get_text_config()
    start = _start(folder, config)[:length]
    progress.begin("writing text", length - len(start), "token")
    ending = _numbers(config.eos_token_id)
    tokens = torch.tensor([start]).expand(sequences, -1)
    unread, cache = tokens, None
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        while tokens.shape[1] < length:
            output = model(unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            require_finite(logits, f"{folder}: the model's logits after {tokens.shape[1]} tokens that it wrote")
            logits[:, ending] = -torch.inf
            unread = torch.multinomial(logits.softmax(-1), 1)
            tokens = torch.cat([tokens, unread], 1)
            progress.advance()
    return tokens.clone()


def _start(folder: Path, config: Any) -> list[int]:
    """What a text begins with: what the tokenizer puts before one, else BOS, else token 0."""
    added = added_before(open_tokenizer(folder)) if has_tokenizer(folder) else []
    return added or _numbers(config.bos_token_id)[:1] or [0]


def _numbers(token: int | list[int] | None) -> list[int]:
    return [] if token is None else [token] if isinstance(token, int) else list(token)
