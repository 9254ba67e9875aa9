"""The block stream computes what the whole model computes, from files, one block at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.blocks import BlockStream
from allocator.blocks.hidden_states import HiddenStates
from allocator.model import read_inventory


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2", "qwen3_moe", "mixtral", "phi3", "gemma3"])
def test_logits_equal_those_of_transformers(kind: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model(kind)
    stream = BlockStream(read_inventory(folder))
    tokens = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(0))
    hidden = HiddenStates(tmp_path, 3, 40, 64)
    stream.fill(hidden, tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(stream.head()(hidden.boundary(2)), model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_inputs_are_recorded_once_for_modules_that_share_them(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    stream = BlockStream(read_inventory(tiny_model("llama")))
    hidden = HiddenStates(tmp_path, 2, 8, 64)
    stream.fill_embeddings(hidden, torch.zeros(2, 8, dtype=torch.int64))
    seen: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    stream.fill_block(hidden, 0, names, lambda sharing, x: seen.append((tuple(sharing), tuple(x.shape))))
    assert seen == [(tuple(names[:3]), (2, 8, 64)), (tuple(names[3:5]), (2, 8, 64)), (tuple(names[5:]), (2, 8, 96))]
