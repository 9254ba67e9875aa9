"""A Hugging Face causal language model run one decoder block at a time, so that one block is resident."""

from allocator.blocks.stream import BlockStream

__all__ = [
    "BlockStream",
]
