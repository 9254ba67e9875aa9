"""What a swapped channel block of an MLP does to the output of its decoder block, computed from these channels alone.

A block cut into 8 pieces has 16 of them: running the whole block for each candidate of each would take eight times what
it takes for the two modules. Nothing before the MLP depends on them, so its input is recorded once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.contract.channels import CUT, REORDERED, piece_name, piece_of

__all__ = ["has_channel_error", "piece_error", "record_mlp_inputs"]

_ADDING = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Blocks whose output is the MLP's plus what it has from before; others put a norm in between."""

_MLP = CUT[0].rpartition(".")[0]


def has_channel_error(block: nn.Module, name: str) -> bool:
    """Whether `piece_error` can be computed for the module `name` of `block`."""
    return piece_of(name) is not None and type(block).__name__ in _ADDING


def record_mlp_inputs(stream: BlockStream, block: nn.Module, states: Tensor) -> Tensor:
    """The input of the MLP `[B * T, D]` for states `[B, T, D]`."""
    seen: list[Tensor] = []
    mlp = block.get_submodule(_MLP)
    hook = mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            stream.run(block, states)
    finally:
        hook.remove()
    return seen[0].flatten(0, 1)


def piece_error(block: nn.Module, name: str, weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The error of the block's output with `weight` in place of the piece `name`'s, for inputs `[n, D]` of its MLP.

    Returns the numbers of all inputs `[n]`, and their errors `[n, D]`.
    """
    parent, number = piece_of(name) or ("", 0)
    mlp: Any = block.get_submodule(_MLP)
    cut: Any = block.get_submodule(parent)
    gate, up = (F.linear(inputs, block.get_parameter(f"{piece_name(local, number)}.weight")) for local in CUT)
    swapped = F.linear(inputs, weight)
    before = mlp.act_fn(gate) * up
    after = mlp.act_fn(swapped) * up if parent == CUT[0] else mlp.act_fn(gate) * swapped
    columns = cut.layout.channels(number, weight.shape[0])
    down = block.get_parameter(f"{REORDERED}.weight")[:, columns]
    return torch.arange(len(inputs), device=inputs.device), F.linear(after - before, down)
