"""The figures that rows consist of: losses by token, intervals, bytes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.real_models.losses import Reference, TokenLosses, paired_interval
from benchmarks.real_models.off_grid import rescaled
from benchmarks.real_models.sizes import sizes_of


def test_a_model_against_itself_loses_nothing_and_agrees_everywhere(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    tokens = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(1))
    reference = Reference.of(model, tokens)
    summary = reference.losses(model).summary()
    assert summary["kl"] == pytest.approx(0, abs=1e-6)
    assert summary["top1"] == 1
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert summary["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    other = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.5)
        p, q = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (model, other))
    losses = reference.losses(other)
    assert losses.kl.mean() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert losses.same_top.mean() == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def losses(kl: np.ndarray) -> TokenLosses:
    return TokenLosses(kl, np.ones_like(kl), kl < 1)


def test_quantiles_are_over_tokens_and_the_error_over_sequences(tmp_path: Path) -> None:
    kl = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    losses(kl).save(tmp_path / "kept.npz")
    summary = TokenLosses.load(tmp_path / "kept.npz").summary()
    assert summary["kl"] == pytest.approx(1999.5)
    assert (summary["kl_median"], summary["kl_p90"]) == pytest.approx((1999.5, 3599.1))
    assert summary["kl_p999"] == pytest.approx(3995.0, abs=0.1)
    assert summary["kl_error"] == pytest.approx(np.std([499.5, 1499.5, 2499.5, 3499.5], ddof=1) / 2)


def test_intervals_are_paired() -> None:
    """Sequences differ a hundredfold; what one model is better by on every one of them is certain nevertheless."""
    kl = np.exp(np.random.default_rng(0).normal(size=(16, 1)) * 3) * np.ones((1, 8))
    assert paired_interval(losses(0.9 * kl), losses(kl)) == pytest.approx((0.9, 0.9))


def test_layers_and_head_are_counted_alike_in_every_format() -> None:
    """Norms, biases and an untied embedding are not; a tied embedding is the head; scales and zero points count."""
    ours = {"model.embed_tokens.weight_packed": 100, "model.embed_tokens.weight_scale": 10, "model.norm.weight": 7}
    ours |= {"model.layers.0.mlp.up_proj.weight_packed": 50, "model.layers.0.mlp.up_proj.weight_zero_point": 3}
    ours |= {"model.layers.0.input_layernorm.weight": 7, "model.layers.0.self_attn.q_proj.bias": 5}
    tied = sizes_of(ours, [200], 1304, tied=True)
    assert (tied.file_bytes, tied.tensor_bytes, tied.layers_and_head_bytes) == (200, 182, 163)
    assert tied.bits_per_weight == 1.0
    assert sizes_of(ours | {"lm_head.weight": 20}, [200], 1, tied=False).layers_and_head_bytes == 73
    theirs = {"token_embd.weight": 110, "output_norm.weight": 7, "blk.0.ffn_up.weight": 53}
    theirs |= {"blk.0.attn_norm.weight": 7, "blk.0.attn_q.bias": 5}
    assert sizes_of(theirs, [200], 1, tied=True).layers_and_head_bytes == 163


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_rescaling_moves_weights_off_their_grid_and_keeps_the_predictions(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # gains and biases that matter, matrices on a grid of 16 steps
        if parameter.dim() == 1:
            parameter.data.normal_(1, 0.3, generator=generator)
        elif ".layers." in name:
            parameter.data = torch.randint(-8, 8, parameter.shape, generator=generator) / 32
    tokens = torch.randint(320, (2, 24), generator=generator)
    with torch.no_grad():
        before = model(tokens).logits
    on_grid = {n: w.clone() for n, w in model.state_dict().items()}
    found = rescaled(dict(on_grid), model.config.to_dict())
    model.load_state_dict(found)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)
    for name, weight in found.items():
        if ".layers." in name and weight.dim() == 2:
            ratios = [len(torch.unique((row / row.abs().max()).round(decimals=4))) for row in weight[:4, :32]]
            assert min(ratios) > 16, name
