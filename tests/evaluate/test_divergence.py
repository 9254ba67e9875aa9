"""KL and perplexity are those of the definition."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.evaluate import measure_divergence


def test_against_the_definition(tiny_model: Callable[[str], Path]) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    other.lm_head.weight.data *= 1.5
    tokens = torch.randint(0, 320, (3, 12), generator=torch.Generator().manual_seed(0))
    found = measure_divergence(original, other, tokens, batch=2)
    with torch.inference_mode():
        p, q = (m(tokens).logits[:, :-1].double().softmax(-1) for m in (original, other))
        expected_kl = float((p * (p / q).log()).sum(-1).mean())
        picked = q.gather(-1, tokens[:, 1:].unsqueeze(-1))
    assert found.tokens == 33
    assert found.kl == pytest.approx(expected_kl, rel=1e-4)
    assert found.perplexity == pytest.approx(float((-picked.log().mean()).exp()), rel=1e-4)
    assert measure_divergence(original, original, tokens).kl == 0
