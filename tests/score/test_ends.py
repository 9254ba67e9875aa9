"""Modules behind which a block need not be run again are told from those that other tokens depend on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.blocks import BlockStream
from allocator.model import read_inventory
from allocator.score.ends import find_ends


@pytest.mark.parametrize(
    ("kind", "additive", "nearly_linear"),
    [
        ("llama", ["mlp.down_proj"], ["self_attn.q_proj", "self_attn.o_proj"]),
        # A norm follows down_proj, so that it stands behind gate_proj and up_proj like any other module.
        ("gemma3", [], ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ("phi3", ["mlp.down_proj"], ["self_attn.o_proj"]),  # its query is in one module with key and value
        ("mixtral", [], []),  # behind its attention a small error may send a token to another expert
    ],
)
def test_keys_and_values_are_no_end(
    kind: str, additive: list[str], nearly_linear: list[str], tiny_model: Callable[[str], Path]
) -> None:
    stream = BlockStream(read_inventory(tiny_model(kind)))
    ends = find_ends(stream, stream.block(1))
    assert list(ends.additive) == additive
    assert list(ends.nearly_linear) == nearly_linear
    assert not ends.within(1).additive
    assert not ends.within(1).nearly_linear
