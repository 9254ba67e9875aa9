"""One decoder block with the candidates of its modules: what each of them, swapped in alone, does to the output.

How one is swapped is in `swapped_block`. A block with 128 experts has 384 weights to swap: each is run alone, on the
tokens that were routed to it.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.blocks.structure import Experts, Routes
from allocator.quantize.candidates import BlockCandidates
from allocator.run.process_group import ALONE, ProcessGroup
from allocator.run.progress import Progress, silent
from allocator.score.ends import few_tokens, find_ends
from allocator.score.swapped_block import Batch, SwappedBlock, Way

__all__ = [
    "Batch",
    "expert_error",
    "is_expert",
    "measure_swaps",
    "record_routes",
]

_BATCHES_TOGETHER = 8
_MOST_KEPT_BYTES = 2 << 30
"""Of several batches, what is kept of the first run of each."""

KeepGradients = Callable[[int, int, Tensor], None]
"""Called with the number of a batch, that of a probe, and its gradient at the block's input `[B, T, D]`."""

Ways = dict[tuple[str, int], Way]
"""How candidates are swapped that need not be swapped exactly, by module and number."""

Found = TypeVar("Found")


def measure_swaps(
    stream: BlockStream,
    block: nn.Module,
    candidates: BlockCandidates,
    batches: Mapping[int, Callable[[], Batch]],
    reduce: Callable[[Tensor], Found],
    progress: Progress = silent,
    whole_blocks: bool = False,
    process_group: ProcessGroup = ALONE,
    below: KeepGradients | None = None,
) -> dict[int, dict[str, Found]]:
    """Swap each candidate in alone, on the teacher's input. Returns for each of `batches`, by module, what `reduce`
    makes of the errors of the block's output along the gradients, `[C, B * S * T]`; those of the last candidate, the
    source itself, are 0.

    All of it is one unit of the step that `progress` is at. Experts are measured on the tokens that chose them. With
    `whole_blocks` the whole block is run for each candidate: the same numbers but for rounding and for what
    `swapped_block.NEARLY` allows, to compare with. `below` is given the gradients at the block's input of each batch,
    where they come about. `batches` are this process's share of those of `process_group`.
    """
    found: dict[int, dict[str, Found]] = {number: {} for number in batches}
    experts = [] if whole_blocks else [name for name in candidates.formats if is_expert(block, name)]
    others = [name for name in candidates.formats if name not in experts]
    ends = None if whole_blocks else find_ends(stream, block)

    def measure(numbers: list[int], ways: Ways | None) -> tuple[Ways, int]:
        """Returns the ways, found if there were none, and the bytes that were kept of the largest batch."""
        with torch.inference_mode():
            swapped = {n: SwappedBlock(stream, block, batches[n], ends, below and partial(below, n)) for n in numbers}
            share = len(numbers) / len(batches)
            tried = _swap_modules(candidates, others, swapped, reduce, found, progress, share, ways)
            return tried, max(of_batch.nbytes for of_batch in swapped.values())

    left = list(batches) if others else []
    first = left[:1] if process_group.leads else []
    untried: Ways | None = {} if process_group.size == len(batches) == 1 else None  # nothing would be gained
    ways, kept = process_group.from_leader(lambda: measure(first, untried) if first else ({}, 0))
    left, few = left[len(first) :], 1
    while left:
        if kept and not candidates.kept_bytes:  # read for every few batches: for as many as there is room for
            few = max(1, _MOST_KEPT_BYTES // kept)
        group, left = left[:few], left[few:]
        _, kept = measure(group, ways)
    if experts:
        with torch.inference_mode():
            _swap_experts(stream, block, candidates, batches, experts, reduce, found, progress)
    # In the order of the candidates, whichever way they were measured.
    return {number: {name: of_batch[name] for name in candidates.formats} for number, of_batch in found.items()}


def _swap_modules(
    candidates: BlockCandidates,
    names: list[str],
    batches: Mapping[int, SwappedBlock],
    reduce: Callable[[Tensor], Found],
    found: dict[int, dict[str, Found]],
    progress: Progress,
    share: float,
    ways: Ways | None,
) -> Ways:
    """Put into `found` what `measure_swaps` returns, for the modules `names` on some batches: a share of all. Where
    `ways` are not known they are found on the first batch, and returned."""
    trial = {} if ways is None else ways
    for name in names:
        errors: dict[int, list[Tensor]] = {number: [] for number in batches}
        tried = ways is None
        for index in reversed(range(len(candidates.formats[name]) - 1)):  # from the one nearest to the source
            weight = candidates.weight(name, index)
            for number, batch in batches.items():
                exact_or_near = batch.errors(name, weight, trial.get((name, index), "exact"))
                errors[number].insert(0, exact_or_near.cpu())
                if tried:
                    way = batch.way_near(name, weight, exact_or_near)
                    tried = way is not None
                    if way is not None:
                        trial[name, index] = way
        for number, of_batch in errors.items():
            found[number][name] = reduce(torch.stack([*of_batch, torch.zeros_like(of_batch[0])]))
        progress.advance(share / len(candidates.formats), name)
    return trial


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
    added = _adds_experts(stream, block)
    for together in _few_at_a_time(batches):
        routes = {number: record_routes(stream, block, batch.states) for number, batch in together.items()}
        gradients_of = {
            number: batch.gradients.flatten(1, 2) if added else _gradients_at_experts(stream, block, batch)
            for number, batch in together.items()
        }
        for name in experts:
            count = len(candidates.formats[name])
            along = {n: torch.zeros(count, *batch.gradients.shape[:1], batch.tokens) for n, batch in together.items()}
            for index in range(count - 1):
                weight = candidates.weight(name, index)
                for number in together:
                    tokens, errors = expert_error(block, name, weight, routes[number])
                    gradients = gradients_of[number][:, tokens]
                    along[number][index][:, tokens.cpu()] = torch.einsum("kd,skd->sk", errors, gradients).cpu()
            for number, batch in together.items():
                by_sequence = along[number].reshape(*along[number].shape[:2], *batch.states.shape[:2]).transpose(1, 2)
                found[number][name] = reduce(by_sequence.flatten(1))
            progress.advance(len(together) / len(batches) / len(candidates.formats), name)


def _adds_experts(stream: BlockStream, block: nn.Module) -> bool:
    """Whether what the experts answer is added to the block's output as it is: not where a norm (Gemma 4), a factor
    (Granite) or a projection (Nemotron-H) comes after them."""
    states, gradient = few_tokens(stream)
    found = _gradients_at_experts(stream, block, Batch(states, states, gradient[None]))
    return torch.equal(found, gradient.flatten(0, 1)[None])


def _gradients_at_experts(stream: BlockStream, block: nn.Module, batch: Batch) -> Tensor:
    """The gradients of `batch` taken back to the output of the block's experts: `[S, B * T, D of the experts]`."""
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    answers: list[Tensor] = []

    def see(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        answers.append(output.detach().requires_grad_())
        return answers[-1]

    hook = experts.register_forward_hook(see)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            output = stream.run(block, batch.states.clone())
            found = [torch.autograd.grad(output, answers, g.clone(), retain_graph=True)[0] for g in batch.gradients]
    finally:
        hook.remove()
    return torch.stack(found).flatten(1, -2)


def is_expert(block: nn.Module, name: str) -> bool:
    """Whether the module `name` of `block` is a matrix of one of its experts."""
    parts = name.split(".")
    return len(parts) > 2 and isinstance(block.get_submodule(".".join(parts[:-2])), Experts)


def record_routes(stream: BlockStream, block: nn.Module, states: Tensor) -> Routes:
    """Where the tokens of `states` `[B, T, D]`, the input of a block with experts, go."""
    experts = next(module for module in block.modules() if isinstance(module, Experts))
    seen: list[Routes] = []

    def see(module: Experts, inputs: tuple[Any, ...]) -> None:
        seen.append(module.routes(*inputs))

    hook = experts.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            stream.run(block, states)
    finally:
        hook.remove()
    return seen[0]


def expert_error(block: nn.Module, name: str, weight: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """The error of what a block's experts answer with `weight` in place of the module `name`'s, one of theirs.

    Returns the numbers of the tokens that chose the expert `[k]`, and their errors `[k, D]`; all others have none.
    """
    path, number, matrix = name.rsplit(".", 2)
    expert = block.get_submodule(f"{path}.{number}")
    tokens, place = torch.where(routes.chosen == int(number))
    inputs = routes.hidden[tokens]
    swapped: Tensor = torch.func.functional_call(expert, {f"{matrix}.weight": weight}, (inputs,))
    return tokens % routes.tokens, (swapped - expert(inputs)) * routes.weights[tokens, place, None]
