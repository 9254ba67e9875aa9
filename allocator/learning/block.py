"""One decoder block with the candidates of its modules: what each of them, swapped in alone, does to the output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.candidates.block import BlockCandidates
from allocator.learning.objective import errors_along

__all__ = ["Batch", "measure_swaps"]


@dataclass(frozen=True)
class Batch:
    """states, teacher: input and output of the original block `[B, T, D]`; gradients: at the output `[S, B, T, D]`."""

    states: Tensor
    teacher: Tensor
    gradients: Tensor


def measure_swaps(
    stream: BlockStream, block: nn.Module, candidates: BlockCandidates, batches: Mapping[int, Callable[[], Batch]]
) -> dict[int, dict[str, Tensor]]:
    """Swap each candidate in alone, on the teacher's input. Returns for each of `batches`, by module, the errors of the
    block's output along the gradients, `[C, S * B * T]`, those of the last candidate, the source itself, being 0.

    Batches are read anew for each candidate: one candidate's weight and one batch of states are in memory at a time.
    """
    errors: dict[int, dict[str, Tensor]] = {number: {} for number in batches}
    with torch.inference_mode():
        for name, formats in candidates.formats.items():
            of_module: dict[int, list[Tensor]] = {number: [] for number in batches}
            for index in range(len(formats) - 1):
                weight = candidates.weight(name, index)
                for number, read in batches.items():
                    batch = read()
                    output = stream.run(block, batch.states, {f"{name}.weight": weight})
                    of_module[number].append(errors_along(output, batch.teacher, batch.gradients).cpu())
            for number, of_candidates in of_module.items():
                errors[number][name] = torch.stack([*of_candidates, torch.zeros_like(of_candidates[0])])
    return errors
