"""One decoder block with the candidates of its modules: what each of them, swapped in alone, does to the output."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from allocator.blocks.channels import errors_of_piece, measurable_piece, record_mlp_inputs
from allocator.blocks.experts import expert_error, is_expert, record_routes
from allocator.blocks.stream import BlockStream
from allocator.candidates.block import BlockCandidates
from allocator.learning.objective import errors_along
from allocator.progress import Progress, silent

__all__ = ["Batch", "measure_swaps"]

_BATCHES_TOGETHER = 8

Found = TypeVar("Found")


@dataclass(frozen=True)
class Batch:
    """states, teacher: input and output of the original block `[B, T, D]`; gradients: at the output `[S, B, T, D]`."""

    states: Tensor
    teacher: Tensor
    gradients: Tensor

    @property
    def tokens(self) -> int:
        return self.states.shape[0] * self.states.shape[1]


def measure_swaps(
    stream: BlockStream,
    block: nn.Module,
    candidates: BlockCandidates,
    batches: Mapping[int, Callable[[], Batch]],
    reduce: Callable[[Tensor], Found],
    progress: Progress = silent,
) -> dict[int, dict[str, Found]]:
    """Swap each candidate in alone, on the teacher's input. Returns for each of `batches`, by module, what `reduce`
    makes of the errors of the block's output along the gradients, `[C, B * S * T]`; those of the last candidate, the
    source itself, are 0.

    Batches are read anew for each candidate: one candidate's weight and one batch of states are in memory at a time.
    All of it is one unit of the step that `progress` is at. Experts are measured on the tokens that chose them, and
    channel blocks by their own channels, on a few batches at a time.
    """
    found: dict[int, dict[str, Found]] = {number: {} for number in batches}
    experts = [name for name in candidates.formats if is_expert(block, name)]
    pieces = {name: piece for name in candidates.formats if (piece := measurable_piece(block, name)) is not None}
    with torch.inference_mode():
        for name, formats in candidates.formats.items():
            if name in experts or name in pieces:
                continue
            of_module: dict[int, list[Tensor]] = {number: [] for number in batches}
            for index in range(len(formats) - 1):
                weight = candidates.weight(name, index)
                for number, read in batches.items():
                    batch = read()
                    output = stream.run(block, batch.states, {f"{name}.weight": weight})
                    of_module[number].append(errors_along(output, batch.teacher, batch.gradients).cpu())
                progress.advance(1 / len(candidates.formats) / (len(formats) - 1), name)
            for number, errors in of_module.items():
                found[number][name] = reduce(torch.stack([*errors, torch.zeros_like(errors[0])]))
        if experts:
            _swap_experts(stream, block, candidates, batches, experts, reduce, found, progress)
        if pieces:
            _swap_pieces(stream, block, candidates, batches, pieces, reduce, found, progress)
    # In the order of the candidates, whichever way they were measured.
    return {number: {name: of_batch[name] for name in candidates.formats} for number, of_batch in found.items()}


def _few_at_a_time(batches: Mapping[int, Callable[[], Batch]]) -> Iterator[dict[int, Batch]]:
    """The batches by number, as many as are in memory together."""
    numbers = list(batches)
    for start in range(0, len(numbers), _BATCHES_TOGETHER):
        yield {number: batches[number]() for number in numbers[start : start + _BATCHES_TOGETHER]}


def _swap_experts(
    stream: BlockStream,
    block: nn.Module,
    candidates: BlockCandidates,
    batches: Mapping[int, Callable[[], Batch]],
    experts: list[str],
    reduce: Callable[[Tensor], Found],
    found: dict[int, dict[str, Found]],
    progress: Progress,
) -> None:
    """Put into `found` what `measure_swaps` returns, for matrices of experts: a few batches are in memory at a time."""
    for together in _few_at_a_time(batches):
        routes = {number: record_routes(stream, block, batch.states) for number, batch in together.items()}
        for name in experts:
            count = len(candidates.formats[name])
            along = {n: torch.zeros(count, *batch.gradients.shape[:1], batch.tokens) for n, batch in together.items()}
            for index in range(count - 1):
                weight = candidates.weight(name, index)
                for number, batch in together.items():
                    tokens, errors = expert_error(block, name, weight, routes[number])
                    gradients = batch.gradients.flatten(1, 2)[:, tokens]
                    along[number][index][:, tokens.cpu()] = torch.einsum("kd,skd->sk", errors, gradients).cpu()
            for number, batch in together.items():
                by_sequence = along[number].reshape(*along[number].shape[:2], *batch.states.shape[:2]).transpose(1, 2)
                found[number][name] = reduce(by_sequence.flatten(1))
            progress.advance(len(together) / len(batches) / len(candidates.formats), name)


def _swap_pieces(
    stream: BlockStream,
    block: nn.Module,
    candidates: BlockCandidates,
    batches: Mapping[int, Callable[[], Batch]],
    pieces: Mapping[str, int],
    reduce: Callable[[Tensor], Found],
    found: dict[int, dict[str, Found]],
    progress: Progress,
) -> None:
    """Put into `found` what `measure_swaps` returns, for channel blocks and their numbers: gate and up together."""
    for together in _few_at_a_time(batches):
        inputs = {number: record_mlp_inputs(stream, block, batch.states) for number, batch in together.items()}
        for piece in sorted(set(pieces.values())):
            weights = {
                name: [candidates.weight(name, index) for index in range(len(candidates.formats[name]) - 1)]
                for name, of_piece in pieces.items()
                if of_piece == piece
            }
            for number, batch in together.items():
                errors = errors_of_piece(block, piece, weights, inputs[number], batch.gradients.flatten(1, 2))
                for name, along in errors.items():
                    by_sequence = along.view(*along.shape[:2], *batch.states.shape[:2]).transpose(1, 2).flatten(1).cpu()
                    found[number][name] = reduce(torch.cat([by_sequence, torch.zeros_like(by_sequence[:1])]))
            for name in weights:
                progress.advance(len(together) / len(batches) / len(candidates.formats), name)
