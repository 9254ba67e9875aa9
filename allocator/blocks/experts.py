"""What a swapped weight of one expert does to the output of its block, computed on the tokens that chose the expert.

A block with 128 experts has 384 such weights: running the whole block for each candidate of each would cost a thousand
times what the experts themselves do. Routing does not depend on them, so it is recorded once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.blocks.structure import Experts

__all__ = ["Routes", "expert_error", "is_expert", "record_routes"]


@dataclass(frozen=True)
class Routes:
    """Input of a block's experts `[n, D]`, and for each of the n tokens its experts and their weights `[n, top_k]`."""

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


def is_expert(block: nn.Module, name: str) -> bool:
    """Whether the module `name` of `block` is a matrix of one of its experts."""
    parts = name.split(".")
    return len(parts) > 2 and isinstance(block.get_submodule(".".join(parts[:-2])), Experts)


def record_routes(stream: BlockStream, block: nn.Module, states: Tensor) -> Routes:
    """Where the tokens of `states` `[B, T, D]`, the input of a block with experts, go."""
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    seen: list[Routes] = []

    def see(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(Routes(*inputs))

    hook = experts.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            stream.run(block, states)
    finally:
        hook.remove()
    return seen[0]


def expert_error(block: nn.Module, name: str, weight: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """The error of the block's output with `weight` in place of the module `name`'s, which must be an expert's.

    Returns the numbers of the tokens that chose the expert `[k]`, and their errors `[k, D]`; all others have none.
    """
    path, number, matrix = name.rsplit(".", 2)
    expert = block.get_submodule(f"{path}.{number}")
    tokens, place = torch.where(routes.chosen == int(number))
    inputs = routes.hidden[tokens]
    swapped: Tensor = torch.func.functional_call(expert, {f"{matrix}.weight": weight}, (inputs,))
    return tokens, (swapped - expert(inputs)) * routes.weights[tokens, place, None]
