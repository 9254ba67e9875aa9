"""One decoder block with the candidates of its modules: what each of them, swapped in alone, does to the output.

Nothing before a module depends on it, so the block is run once and then again from the module that is swapped (see
`blocks.replay`). Where the output is a sum that a module adds to, as down_proj mostly does, that module is not run
again either: the gradients are taken back through its weight once, and meet the change of its input. A block with 128
experts has 384 weights to swap: each is run alone, on the tokens that were routed to it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from allocator.blocks.products import linear
from allocator.blocks.replay import Replay, ReplayError
from allocator.blocks.stream import BlockStream
from allocator.blocks.structure import Experts, Routes
from allocator.quantize.candidates import BlockCandidates
from allocator.run.progress import Progress, silent
from allocator.score.objective import errors_along

__all__ = [
    "Batch",
    "expert_error",
    "is_expert",
    "measure_swaps",
    "record_routes",
]

_BATCHES_TOGETHER = 8
_FEW_TOKENS = 8
_MOST_KEPT_BYTES = 2 << 30
"""Of several batches, what is kept of the first run of each."""

_MOST_PULLED_BYTES = 1 << 30
"""Of gradients taken back through a weight; where they are more, the module is run again."""

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
    whole_blocks: bool = False,
) -> dict[int, dict[str, Found]]:
    """Swap each candidate in alone, on the teacher's input. Returns for each of `batches`, by module, what `reduce`
    makes of the errors of the block's output along the gradients, `[C, B * S * T]`; those of the last candidate, the
    source itself, are 0.

    All of it is one unit of the step that `progress` is at. Experts are measured on the tokens that chose them. With
    `whole_blocks` the whole block is run for each candidate: the same numbers but for rounding, to compare with.
    """
    found: dict[int, dict[str, Found]] = {number: {} for number in batches}
    experts = [] if whole_blocks else [name for name in candidates.formats if is_expert(block, name)]
    others = [name for name in candidates.formats if name not in experts]
    ends = {} if whole_blocks else _additive(stream, block)
    left, few = list(batches) if others else [], 1
    while left:
        group, left = left[:few], left[few:]
        with torch.inference_mode():
            swapped = {n: _Swapped(stream, block, batches[n](), ends, not whole_blocks) for n in group}
            if not candidates.kept_bytes:  # read for every few batches: for as many as there is room for
                few = max(1, _MOST_KEPT_BYTES // max(of_batch.nbytes for of_batch in swapped.values()))
            _swap_modules(candidates, others, swapped, reduce, found, progress, len(group) / len(batches))
        swapped.clear()
    if experts:
        with torch.inference_mode():
            _swap_experts(stream, block, candidates, batches, experts, reduce, found, progress)
    # In the order of the candidates, whichever way they were measured.
    return {number: {name: of_batch[name] for name in candidates.formats} for number, of_batch in found.items()}


def _swap_modules(
    candidates: BlockCandidates,
    names: list[str],
    batches: Mapping[int, "_Swapped"],
    reduce: Callable[[Tensor], Found],
    found: dict[int, dict[str, Found]],
    progress: Progress,
    share: float,
) -> None:
    """Put into `found` what `measure_swaps` returns, for the modules `names` on some batches: a share of all."""
    for name in names:
        errors: dict[int, list[Tensor]] = {number: [] for number in batches}
        for index in range(len(candidates.formats[name]) - 1):
            weight = candidates.weight(name, index)
            for number, batch in batches.items():
                errors[number].append(batch.errors(f"{name}.weight", weight).cpu())
        for number, of_batch in errors.items():
            found[number][name] = reduce(torch.stack([*of_batch, torch.zeros_like(of_batch[0])]))
        progress.advance(share / len(candidates.formats), name)


def _additive(stream: BlockStream, block: nn.Module) -> dict[str, Tensor]:
    """The weights of those linear modules of `block`, by name, whose output is added to the block's and does nothing
    else: there the gradient is that of the block's output itself, whatever it is."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, _FEW_TOKENS, stream.inventory.shape.hidden_size)
    states, gradient = torch.randn(shape, generator=generator).to(stream.device)
    outputs: dict[str, Tensor] = {}
    # Not what makes more of a product, as Llama 4's router does.
    linears = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
        for name, module in linears.items()
    ]
    try:
        with torch.enable_grad():
            output = stream.run(block, states.requires_grad_(True))
    finally:
        for hook in hooks:
            hook.remove()
    found = torch.autograd.grad(output, list(outputs.values()), gradient, allow_unused=True)
    same = [name for name, own in zip(outputs, found, strict=True) if own is not None and torch.equal(own, gradient)]
    return {name: block.get_parameter(f"{name}.weight") for name in same if linears[name].bias is None}


@dataclass
class _Swapped:
    """A batch on which one weight at a time is swapped. `ends`: the weights of modules that add to the output."""

    stream: BlockStream
    block: nn.Module
    batch: Batch
    ends: Mapping[str, Tensor]
    replays: bool
    _replay: Replay | None = None
    _pulled: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.replays:
            return
        wide = sum(weight.shape[1] for weight in self.ends.values())
        if 4 * self.batch.gradients.shape[0] * self.batch.tokens * wide > _MOST_PULLED_BYTES:
            self.ends = {}
        self._gradients = _by_token(self.batch.gradients)
        self._pulled = {name: linear(self._gradients, weight.T) for name, weight in self.ends.items()}
        self._replay = Replay(self.ends)
        with self._replay:
            self._output = self.stream.run(self.block, self.batch.states)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept of the batch."""
        gradients = 0 if self._replay is None else self._gradients.nbytes + sum(g.nbytes for g in self._pulled.values())
        return self.batch.gradients.nbytes + gradients + (self._replay.nbytes if self._replay else 0)

    def errors(self, parameter: str, weight: Tensor) -> Tensor:
        """`errors_along` of the block's output with `weight` in the place of `parameter`: `[B * S * T]`."""
        if self._replay is not None:
            try:
                return self._errors_by_replay(self._replay, parameter, weight)
            except ReplayError:
                self._replay = None
        output = self.stream.run(self.block, self.batch.states, {parameter: weight})
        return errors_along(output, self.batch.teacher, self.batch.gradients)

    def _errors_by_replay(self, replay: Replay, parameter: str, weight: Tensor) -> Tensor:
        batch = self.batch
        with replay:
            output = self.stream.run(self.block, batch.states, {parameter: weight})
        along = self._gradients.new_zeros(self._gradients.shape[:2])  # [B * T, S]
        if output is not self._output:
            along += _along(self._gradients, output - self._output)  # what rounding the two have in common goes
        for name, inputs in replay.at_ends.items():
            along += _along(self._pulled[name], inputs - replay.inputs_of_ends[name])
        sequences, tokens, _ = batch.states.shape
        return along.view(sequences, tokens, -1).transpose(1, 2).flatten()


def _by_token(gradients: Tensor) -> Tensor:
    """`[S, B, T, D]` to `[B * T, S, D]`, in one piece."""
    return gradients.flatten(1, 2).transpose(0, 1).contiguous()


def _along(gradients: Tensor, errors: Tensor) -> Tensor:
    """Errors `[B, T, K]` along gradients `[B * T, S, K]`: `[B * T, S]`."""
    return torch.bmm(errors.reshape(len(gradients), 1, -1), gradients.transpose(1, 2)).squeeze(1)


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
    """The error of the block's output with `weight` in place of the module `name`'s, which must be an expert's.

    Returns the numbers of the tokens that chose the expert `[k]`, and their errors `[k, D]`; all others have none.
    """
    path, number, matrix = name.rsplit(".", 2)
    expert = block.get_submodule(f"{path}.{number}")
    tokens, place = torch.where(routes.chosen == int(number))
    inputs = routes.hidden[tokens]
    swapped: Tensor = torch.func.functional_call(expert, {f"{matrix}.weight": weight}, (inputs,))
    return tokens % routes.tokens, (swapped - expert(inputs)) * routes.weights[tokens, place, None]
