"""Errors of swapped experts are those of the whole block, without running it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.model import read_inventory
from allocator.score.swaps import expert_error, is_expert, record_routes


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_errors_equal_those_of_the_whole_block(kind: str, tiny_model: Callable[[str], Path]) -> None:
    stream = BlockStream(read_inventory(tiny_model(kind)))
    block = stream.block(1)
    states = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
    names = [n for n, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    experts = [name for name in names if is_expert(block, name)]
    assert len(experts) == 3 * {"qwen3_moe": 8, "mixtral": 4}[kind]
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
