"""One decoder block with the candidates of its modules: what each of them, swapped in alone, does to the output.

A block with 128 experts has 384 weights to swap, one cut into 8 channel blocks has 16 pieces: running the whole block
for each of their candidates would cost many times what they do themselves. Nothing before them depends on them, so
their inputs (and where tokens are routed) are recorded once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.blocks.structure import Experts
from allocator.contract.channel_blocks import CUT, REORDERED
from allocator.contract.modules import parent_of, row_block_name, row_block_of
from allocator.quantize.candidates import BlockCandidates
from allocator.run.progress import Progress, silent
from allocator.score.objective import errors_along

__all__ = [
    "Batch",
    "Routes",
    "errors_of_piece",
    "expert_error",
    "is_expert",
    "measurable_piece",
    "measure_swaps",
    "record_mlp_inputs",
    "record_routes",
]

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


_ADDING = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Blocks whose output is the MLP's plus what it has from before; others put a norm in between."""

_MLP = CUT[0].rpartition(".")[0]


def measurable_piece(block: nn.Module, name: str) -> int | None:
    """The number of the piece that the module `name` is, if `errors_of_piece` holds for `block`."""
    piece = row_block_of(name)
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
    gate, up = (F.linear(inputs, block.get_parameter(f"{row_block_name(local, number)}.weight")) for local in CUT)
    columns = cut.places[number].numbers()
    channel_gradients = gradients @ block.get_parameter(f"{REORDERED}.weight")[:, columns]
    active = mlp.act_fn(gate)
    before = active * up
    found = {}
    for name, candidates in weights.items():
        along = []
        for weight in candidates:
            swapped = F.linear(inputs, weight)
            after = mlp.act_fn(swapped) * up if parent_of(name) == CUT[0] else active * swapped
            along.append(torch.einsum("nw,snw->sn", after - before, channel_gradients))
        found[name] = torch.stack(along)
    return found
