"""The modules outside the blocks: what each of their candidates, swapped in alone, does to the predictions.

The embedding's output is boundary 0, so the errors of its rows are read along the gradients there, as in a block. The
lm_head makes the logits: a change D of its weight changes them by D h, exactly. The gradients by the logits of a probe
are r_v - p_v sum_y r_y, r being x_v sqrt(S p_v) for the tokens that are dealt to it, x their signs, and 0 for others
(see `blocks.gradients`). One module for both has one error at both ends, whose numbers add up. So these are numbers of
the same kind as those of the blocks, for the same positions and probes, and have correlations with all of them.

The vocabulary is gone through in stripes of rows: neither `[tokens, vocabulary]` nor a dequantized weight is in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from allocator.blocks.gradients import dealt, draw_signs, parts_of_sequence, rows_together
from allocator.blocks.products import linear
from allocator.blocks.stream import BlockStream
from allocator.blocks.tensors import read_rows
from allocator.contract.layout import ModuleFormat
from allocator.quantize.bank_reader import BankReader
from allocator.quantize.candidates import VocabularyCandidates
from allocator.run.progress import Progress, silent
from allocator.score.teacher import Teacher

__all__ = ["Text", "measure_vocabulary"]

_TOGETHER = 8
"""Batches for which a stripe is dequantized once."""

_TOKENS_TOGETHER = 512
"""Of a batch, so that what is computed of a stripe stays in the cache."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Text:
    """token_ids: int64 `[S, T]`; seed: that of the teacher's gradients; batches: numbers of the sequences of each."""

    teacher: Teacher
    token_ids: Tensor
    seed: int
    batches: Mapping[int, Tensor]

    def groups(self) -> Iterator[list[int]]:
        """The numbers of a few batches at a time."""
        numbers = list(self.batches)
        for start in range(0, len(numbers), _TOGETHER):
            yield numbers[start : start + _TOGETHER]

    def signs(self, batch: int, rows: slice) -> Tensor:
        """Of the tokens of a batch, for one of `rows_together`: int8 `[B * T, rows]`."""
        parts = parts_of_sequence(self.token_ids.shape[1])
        wanted = [(sequence, part, rows) for sequence in self.batches[batch].tolist() for part in parts]
        return torch.cat(draw_signs(self.seed, wanted))


def measure_vocabulary(
    stream: BlockStream,
    bank: BankReader,
    candidates: VocabularyCandidates,
    text: Text,
    reduce: Callable[[Tensor], Found],
    progress: Progress = silent,
) -> dict[int, dict[str, Found]]:
    """As `block.measure_swaps` for the modules of `candidates`: by batch of `text` and module what `reduce` makes of
    the errors along the gradients, `[C, B * S * T]`; those of the last candidate, the source itself, are 0. All of it
    is one unit of the step that `progress` is at.
    """
    found: dict[int, dict[str, Found]] = {number: {} for number in text.batches}
    probes, length = len(text.teacher.gradients), text.token_ids.shape[1]
    share = 1 / max(1, sum((name == candidates.embedding) + (name == candidates.head) for name in candidates.formats))
    with torch.inference_mode():
        for name, formats in candidates.formats.items():
            sums = {n: torch.zeros(len(formats), probes, len(rows) * length) for n, rows in text.batches.items()}
            if name == candidates.embedding:
                _add_embedding(stream, bank, name, formats[:-1], text, sums)
                progress.advance(share, name)
            if name == candidates.head:
                _add_head(stream, bank, name, formats[:-1], text, sums, progress, share)
            for number, of_batch in sums.items():
                by_sequence = of_batch.view(len(formats), probes, -1, length).transpose(1, 2)
                found[number][name] = reduce(by_sequence.flatten(1))
    return found


def _add_embedding(
    stream: BlockStream,
    bank: BankReader,
    name: str,
    formats: Sequence[ModuleFormat],
    text: Text,
    sums: Mapping[int, Tensor],
) -> None:
    source = stream.read(f"{name}.weight")
    for group in text.groups():
        ids = [text.token_ids[text.batches[n]].flatten() for n in group]
        tokens, places = torch.unique(torch.cat(ids), return_inverse=True)
        own = source[tokens.to(stream.device)].float()
        changes = [bank.rows(name, form, tokens).to(stream.device) - own for form in formats]
        for n, place in zip(group, torch.split(places, [len(of_batch) for of_batch in ids]), strict=True):
            gradients = text.teacher.gradients_at(stream, 0, text.batches[n]).flatten(1, 2)
            gradients = stream.side_states.hidden(gradients)
            for number, change in enumerate(changes):
                errors = stream.embedded(place, change)
                for probe, gradient in enumerate(gradients):
                    sums[n][number, probe] += (gradient * errors).sum(-1).cpu()


def _add_head(
    stream: BlockStream,
    bank: BankReader,
    name: str,
    formats: Sequence[ModuleFormat],
    text: Text,
    sums: Mapping[int, Tensor],
    progress: Progress,
    share: float,
) -> None:
    stored, norm, softcap = stream.inventory.tensor(f"{name}.weight"), stream.norm(), stream.softcap
    for group in text.groups():
        last = {n: text.teacher.hidden.boundary(stream.blocks)[text.batches[n]] for n in group}
        states = {n: norm(h.to(stream.device)).flatten(0, 1) for n, h in last.items()}
        heads = {n: _Head(h, len(text.teacher.gradients), len(formats), softcap) for n, h in states.items()}
        for rows in rows_together(stored.shape[0]):
            weight = read_rows(stored, rows, stream.device).float()
            for head in heads.values():
                head.see(weight)
        for rows in rows_together(stored.shape[0]):
            weight = read_rows(stored, rows, stream.device).float()
            steps = [bank.stripe(name, form, rows, stream.device) - weight for form in formats]
            for n, head in heads.items():
                head.add(weight, steps, text.signs(n, rows))
            progress.advance(share * len(group) / len(text.batches) * (rows.stop - rows.start) / stored.shape[0], name)
        for n, head in heads.items():
            sums[n][:-1] += head.result().cpu()


class _Head:
    """What is summed over the vocabulary for the tokens of a batch, `states` `[n, D]` being the lm_head's input.

    First all stripes of the weight are seen, for the normaliser of the probabilities; then they are gone through again.
    """

    def __init__(self, states: Tensor, probes: int, candidates: int, softcap: float | None) -> None:
        self.probes = probes
        self._states, self._softcap = states, softcap
        self._normaliser = torch.full((len(states),), -torch.inf, device=states.device)
        self._signed = states.new_zeros(candidates, probes, len(states))
        self._mean = states.new_zeros(candidates, len(states))
        self._roots = states.new_zeros(probes, len(states))

    def see(self, weight: Tensor) -> None:
        """weight: a stripe `[rows, D]` of the original."""
        self._normaliser = torch.logaddexp(self._normaliser, self._logits(weight, self._states).logsumexp(-1))

    def add(self, weight: Tensor, steps: Sequence[Tensor], signs: Tensor) -> None:
        """steps: by candidate how a stripe differs, `[rows, D]`; signs: `Text.signs` of it, `[n, rows]`."""
        for tokens in torch.split(torch.arange(len(self._states)), _TOKENS_TOGETHER):
            self._add(slice(int(tokens[0]), int(tokens[-1]) + 1), weight, steps, signs)

    def _add(self, tokens: slice, weight: Tensor, steps: Sequence[Tensor], signs: Tensor) -> None:
        states = self._states[tokens]
        logits = self._logits(weight, states)
        root = ((logits - self._normaliser[tokens].unsqueeze(1)) / 2).exp_()
        probability = root.square().unsqueeze(1)
        root *= signs[tokens].to(root.device)
        self._roots[:, tokens] += dealt(root, self.probes, 1).sum(-1)
        slope = None if self._softcap is None else 1 - (logits / self._softcap).square_()  # to first order
        # Sums of each probe's own, as a product: `[rows, S]`.
        own = dealt(torch.eye(len(weight), device=root.device), self.probes, 0).sum(1).T
        for number, step in enumerate(steps):
            change = linear(states, step)
            if slope is not None:
                change *= slope
            self._mean[number, tokens] += torch.bmm(probability, change.unsqueeze(2)).flatten()
            self._signed[number][:, tokens] += (change.mul_(root) @ own).T

    def result(self) -> Tensor:
        """The errors along the gradients of each probe, `[C, S, n]`."""
        return (self._signed - self._mean.unsqueeze(1) * self._roots) * math.sqrt(self.probes)

    def _logits(self, weight: Tensor, states: Tensor) -> Tensor:
        logits = linear(states, weight)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)
