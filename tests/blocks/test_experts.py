"""Errors of swapped experts are those of the whole block, without running it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.model import read_inventory
from allocator.score.swaps import expert_error, is_expert, record_routes
from tests.families import FAMILIES, make_family


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_errors_equal_those_of_the_whole_block(kind: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_family(kind, tmp_path / kind) if kind in FAMILIES else tiny_model(kind)
    stream = BlockStream(read_inventory(folder))
    block = stream.block(1)
    states = torch.randn(2, 24, stream.inventory.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    names = [n for n, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    experts = [name for name in names if is_expert(block, name)]
    assert len(experts) == {"qwen3_moe": 24, "mixtral": 12, "gpt_oss": 8, "llama4_text": 12}[kind]
    assert "self_attn.q_proj" not in experts
    routes = record_routes(stream, block, states)
    with torch.inference_mode():
        teacher = stream.run(block, states)
        for name in experts:
            weight = block.get_parameter(f"{name}.weight") + 0.1
            whole = (stream.run(block, states, {f"{name}.weight": weight}) - teacher).flatten(0, 1)
            tokens, errors = expert_error(block, name, weight, routes)
            sparse = torch.zeros_like(whole)
            sparse[tokens] = errors
            torch.testing.assert_close(sparse, whole, rtol=1e-4, atol=1e-5)
