"""An 8-bit KV cache costs what its rounding costs, and nothing else."""

import json
import subprocess
import sys

import pytest
import torch

from allocator.contract.scores import KvCacheScores
from allocator.evaluate import fp8_kv_cache
from allocator.evaluate.fp8_kv_cache import measure_kv_cache, round_to_fp8

TOKENS = torch.randint(1, 250, (3, 48), generator=torch.Generator().manual_seed(0))


def test_rounding_is_that_of_e4m3():
    values = torch.tensor([0.0, 1.0, 1.0625, 1.1, 447.0, 1000.0, -1e9, 2.0**-9, 2.0**-10])
    rounded = round_to_fp8(values)
    assert rounded.tolist() == [0.0, 1.0, 1.0, 1.125, 448.0, 448.0, -448.0, 2.0**-9, 0.0]
    assert torch.equal(round_to_fp8(rounded), rounded)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_only_the_rounding_counts(tiny_model, monkeypatch, kind):
    fp8 = measure_kv_cache(tiny_model(kind), TOKENS)
    coarse = measure_kv_cache(tiny_model(kind), TOKENS, "fp8_e5m2")
    assert 0 < fp8.kl < coarse.kl  # one bit of mantissa less
    assert fp8.tokens == 3 * 47
    monkeypatch.setattr(fp8_kv_cache, "round_to_fp8", lambda values, dtype: values)
    assert abs(measure_kv_cache(tiny_model(kind), TOKENS).kl) < 1e-9


def test_it_agrees_with_rounding_by_hand(tiny_model):
    """Keys after the rotary embedding and values are rounded: a model with a cache that was rounded says the same."""
    from transformers import AutoModelForCausalLM, DynamicCache

    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class RoundedCache(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *arguments, **options):
            return super().update(
                round_to_fp8(key_states), round_to_fp8(value_states), layer_idx, *arguments, **options
            )

    with torch.inference_mode():
        plain = model(TOKENS).logits[:, :-1].log_softmax(-1)
        rounded = model(TOKENS, past_key_values=RoundedCache()).logits[:, :-1].log_softmax(-1)
    expected = float((plain.exp() * (plain - rounded)).sum(-1).mean())
    assert measure_kv_cache(folder, TOKENS).kl == pytest.approx(expected, rel=1e-3)


def test_the_verb_writes_a_document_of_this_model(tiny_model, tmp_path):
    out = tmp_path / "kv_cache.json"
    command = [sys.executable, "-m", "allocator.cli.main", "kv", str(tiny_model("qwen3")), "--out", str(out)]
    options = ["--sequences", "2", "--sequence-length", "24", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = KvCacheScores.read(out)
    assert json.loads(done.stdout)["losses"] == measured.losses
    assert set(measured.losses) == {"fp8"}
    assert measured.tokens == 2 * 23
