"""What a swapped channel block of an MLP does to the output of its decoder block, computed from these channels alone.

A block cut into 8 pieces has 16 of them: running the whole block for each candidate of each would take eight times what
it takes for the two modules. Nothing before the MLP depends on them, so its input is recorded once; and what an error
of the channels does along a gradient of the block's output is had from the gradient by them, computed once too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.contract.channels import CUT, REORDERED, parent_of, piece_name, piece_of

__all__ = ["errors_of_piece", "measurable_piece", "record_mlp_inputs"]

_ADDING = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Blocks whose output is the MLP's plus what it has from before; others put a norm in between."""

_MLP = CUT[0].rpartition(".")[0]


def measurable_piece(block: nn.Module, name: str) -> int | None:
    """The number of the piece that the module `name` is, if `errors_of_piece` holds for `block`."""
    piece = piece_of(name)
    return piece[1] if piece is not None and type(block).__name__ in _ADDING else None


def record_mlp_inputs(stream: BlockStream, block: nn.Module, states: Tensor) -> Tensor:
    """The input of the MLP `[B * T, D]` for states `[B, T, D]`."""
    seen: list[Tensor] = []
    hook = block.get_submodule(_MLP).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            stream.run(block, states)
    finally:
        hook.remove()
    return seen[0].flatten(0, 1)


def errors_of_piece(
    block: nn.Module, number: int, weights: Mapping[str, Sequence[Tensor]], inputs: Tensor, gradients: Tensor
) -> dict[str, Tensor]:
    """The error of the block's output along each gradient, with each of `weights` in the place of the piece's own.

    weights: the candidates `[w, K]` of pieces `number` of gate_proj and up_proj, by name; inputs `[n, D]` of the MLP;
    gradients `[S, n, D]` at the block's output. By name: `[C, S, n]`.
    """
    mlp: Any = block.get_submodule(_MLP)
    cut: Any = block.get_submodule(CUT[0])
    gate, up = (F.linear(inputs, block.get_parameter(f"{piece_name(local, number)}.weight")) for local in CUT)
    columns = cut.layout.channels(number, gate.shape[1])
    slopes = gradients @ block.get_parameter(f"{REORDERED}.weight")[:, columns]
    active = mlp.act_fn(gate)
    before = active * up
    found = {}
    for name, candidates in weights.items():
        along = []
        for weight in candidates:
            swapped = F.linear(inputs, weight)
            after = mlp.act_fn(swapped) * up if parent_of(name) == CUT[0] else active * swapped
            along.append(torch.einsum("nw,snw->sn", after - before, slopes))
        found[name] = torch.stack(along)
    return found
