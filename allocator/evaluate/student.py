"""The model with a given assignment, run block by block: its divergence from the original, and what changes it.

One block is resident, with the candidates it is given. Blocks and dequantized candidates are kept in memory as long
as they fit into `hold_bytes`, so that a small model is read once and then answers in fractions of a second.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.blocks.finite import require_finite
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import HEAD_WEIGHT, BlockStream
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.evaluate.divergence import kl_by_token, surprise_by_token
from allocator.quantize.bank_reader import BankReader
from allocator.quantize.candidates import BlockCandidates, VocabularyCandidates

__all__ = ["Assignment", "Losses", "Student"]

_CHUNK_TOKENS = 2048
_HOLD_BYTES = 4 << 30
_HOLD_LOGPROBS_BYTES = 1 << 30

Assignment = Mapping[str, ModuleFormat]


@dataclass(frozen=True)
class Losses:
    """By sequence, in nats a token `[S]`, float64: `kl` from the original, `nll` of the text."""

    kl: Tensor
    nll: Tensor


class Student:
    """Runs assignments on `token_ids` (int64 `[S, T]`) and compares them with the original model.

    vocabulary: the candidates of the modules outside the blocks.
    Modules that an assignment does not name, and those it gives 16 bits, keep the source's weights. Whatever takes an
    assignment raises ContractError for a module that the model does not have, and for one in a format that the bank
    does not have.
    """

    def __init__(self, stream: BlockStream, bank: BankReader, token_ids: Tensor, hold_bytes: int = _HOLD_BYTES) -> None:
        self._open(stream, bank, token_ids, hold_bytes)
        with torch.no_grad():
            self._embedded = torch.cat([stream.embed(rows) for rows in self._chunks(token_ids)])
            self._teacher = torch.cat(self._run({}, self._chunks(self._embedded))[-1])

    @classmethod
    def of_teacher(
        cls,
        stream: BlockStream,
        bank: BankReader,
        hidden: HiddenStates,
        token_ids: Tensor,
        hold_bytes: int = _HOLD_BYTES,
    ) -> "Student":
        """A student of the text whose states in the original model are already in `hidden`."""
        student = cls.__new__(cls)
        student._open(stream, bank, token_ids, hold_bytes)
        boundaries = [hidden.boundary(i) for i in range(stream.blocks + 1)]
        student._embedded, student._teacher = boundaries[0], boundaries[-1]
        student._kept = ({}, boundaries)
        return student

    def for_tokens(self, token_ids: Tensor) -> "Student":
        """A student of other text that shares what this one holds in memory."""
        other = copy.copy(self)
        other.token_ids, other._kept, other._logprobs = token_ids, None, None
        with torch.no_grad():
            other._embedded = torch.cat([self.stream.embed(rows) for rows in self._chunks(token_ids)])
            other._teacher = torch.cat(other._run({}, self._chunks(other._embedded))[-1])
        return other

    def _open(self, stream: BlockStream, bank: BankReader, token_ids: Tensor, hold_bytes: int) -> None:
        self.stream, self.bank, self.token_ids = stream, bank, token_ids
        self._blocks: dict[int, tuple[nn.Module, BlockCandidates]] = {}
        self._head = stream.head()
        self.vocabulary = VocabularyCandidates(stream.inventory, stream, bank)
        self._free = [hold_bytes - self.vocabulary.kept_bytes]  # shared by the students of `for_tokens`
        self._tokens = stream.inventory.shape.vocabulary
        self._kept: tuple[Assignment, list[Tensor]] | None = None
        self._logprobs: Tensor | None = None
        inventory = stream.inventory
        stored = {name: {form.num_bits: form for form in bank.formats(name)} for name in bank.bank.modules}
        self._formats = {m.name: stored.get(m.name, {}) for m in inventory.modules}
        scored = [m for m in inventory.modules if m.name in bank.bank.modules]
        self._local = [
            {m.name.removeprefix(inventory.block_prefix(i)): m.name for m in scored if m.block == i}
            for i in range(stream.blocks)
        ]

    def _chunks(self, tensor: Tensor) -> list[Tensor]:
        return list(torch.split(tensor, max(1, _CHUNK_TOKENS // tensor.shape[1])))

    def _check(self, assignment: Assignment) -> None:
        for name, form in assignment.items():
            if name not in self._formats:
                raise ContractError(
                    f"{name}: {self.stream.inventory.folder} has no such module, as the bank {self.bank.folder} "
                    "arranges it; measure with the model and the bank of the assignment"
                )
            if form.quantized and self._formats[name].get(form.num_bits) != form:
                known = sorted(bits for bits, found in self._formats[name].items() if found.quantized)
                raise ContractError(
                    f"{name}: the bank {self.bank.folder} has no candidate of {form.num_bits} bits, group_size "
                    f"{form.group_size}, symmetric {form.symmetric}; its widths are {known}"
                )

    def local_names(self, index: int) -> dict[str, str]:
        """Name inside block `index` -> module name, for the modules that have candidates."""
        return self._local[index]

    def losses(self, assignment: Assignment, keep: bool = False, rows: Tensor | None = None) -> Losses:
        """Divergence from the original and loss of the text under `assignment`, on the sequences `rows` or all.

        With `keep` the states between blocks stay in memory: the next assignments are run from the first block in
        which they differ from this one.
        """
        self._check(assignment)
        with torch.no_grad():
            if self._kept is None or self._embeds_otherwise(self._kept[0], assignment):
                start, before = 0, self._embed(assignment)
            else:
                kept, boundaries = self._kept
                start = next(
                    (i for i in range(self.stream.blocks) if self._differs(i, kept, assignment)), self.stream.blocks
                )
                before = boundaries[start]
            chunks = self._chunks(before if rows is None else before[rows])
            states = self._run(assignment, chunks, start, keep)
            if keep:
                earlier = [] if self._kept is None else self._kept[1][:start]
                self._kept = (dict(assignment), [*earlier, *map(torch.cat, states)])
            return self._compare(states[-1], assignment, rows)

    def states(self, assignment: Assignment, rows: Tensor | None = None) -> list[list[Tensor]]:
        """The states before each block and after the last, each in chunks of sequences `[s, T, D]`."""
        self._check(assignment)
        embedded = self._embed(assignment)
        chunks = self._chunks(embedded if rows is None else embedded[rows])
        return self._run(assignment, chunks, 0, every=True)

    def _embed(self, assignment: Assignment) -> Tensor:
        """The states before block 0."""
        name = self.vocabulary.embedding
        if name is None or _bits(assignment, name) == 16:
            return self._embedded
        table = self.vocabulary_weight(name, assignment)
        return torch.cat([self.stream.embed(rows, table) for rows in self._chunks(self.token_ids)])

    def _embeds_otherwise(self, a: Assignment, b: Assignment) -> bool:
        name = self.vocabulary.embedding
        return name is not None and _bits(a, name) != _bits(b, name)

    def _differs(self, index: int, a: Assignment, b: Assignment) -> bool:
        return any(_bits(a, name) != _bits(b, name) for name in self._local[index].values())

    def _run(
        self, assignment: Assignment, chunks: list[Tensor], start: int = 0, every: bool = False
    ) -> list[list[Tensor]]:
        """States from before block `start` to after the last, or after the last only."""
        boundaries = [chunks]
        for index in range(start, self.stream.blocks):
            block, weights = self.block(index)[0], self.weights(index, assignment)
            chunks = [self.stream.run(block, chunk, weights) for chunk in chunks]
            boundaries = [*boundaries, chunks] if every else [chunks]
        return boundaries

    def _compare(self, states: list[Tensor], assignment: Assignment, rows: Tensor | None) -> Losses:
        kl, nll = [], []
        weight = self._head_weight(assignment)
        for ours, teacher, ids in self._beside_teacher(states, rows):
            q = self._predict(ours, weight)
            kl.append(kl_by_token(teacher, q).double().mean(-1))
            nll.append(surprise_by_token(q, ids).double().mean(-1))
        found = Losses(torch.cat(kl).cpu(), torch.cat(nll).cpu())
        require_finite(found.kl, f"{self.stream.inventory.folder}: KL divergences of an assignment, by sequence")
        return found

    def _beside_teacher(self, states: list[Tensor], rows: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of states, of the original's log probabilities `[s, T-1, V]`, and of token ids."""
        teacher, ids = (t if rows is None else t[rows] for t in (self._teacher, self.token_ids))
        if self._logprobs is None and 4 * self.token_ids.numel() * self._tokens <= _HOLD_LOGPROBS_BYTES:
            self._logprobs = torch.cat([self._teacher_logprobs(chunk) for chunk in self._chunks(self._teacher)])
        if self._logprobs is not None:
            held = self._logprobs if rows is None else self._logprobs[rows]
            logprobs: Iterable[Tensor] = self._chunks_like(states, held)
        else:
            logprobs = map(self._teacher_logprobs, self._chunks(teacher))
        return zip(states, logprobs, self._chunks_like(states, ids), strict=True)

    def _chunks_like(self, states: list[Tensor], tensor: Tensor) -> list[Tensor]:
        return list(torch.split(tensor, [len(chunk) for chunk in states]))

    def _teacher_logprobs(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return self._predict(states, None)

    def _predict(self, states: Tensor, head_weight: Tensor | None) -> Tensor:
        """Log probabilities `[s, T-1, V]` after the states of the last block, with `head_weight` or the original's."""
        weights = {} if head_weight is None else {HEAD_WEIGHT: head_weight}
        logits: Tensor = torch.func.functional_call(self._head, weights, (states[:, :-1],))
        return logits.log_softmax(-1)

    def _head_weight(self, assignment: Assignment) -> Tensor | None:
        """The lm_head's weight under `assignment`, None where it is the original's."""
        name = self.vocabulary.head
        return None if name is None or _bits(assignment, name) == 16 else self.vocabulary_weight(name, assignment)

    def output_gradients(
        self, states: list[Tensor], assignment: Assignment, rows: Tensor | None = None
    ) -> tuple[Losses, list[Tensor], Tensor | None]:
        """Losses, and the gradients of the mean KL by the states after the last block and by the weight of the lm_head
        (None if it has no candidates).

        The mean is over all positions that predict a token; states and gradients are in chunks as `states` gives them.
        """
        positions = sum(s.shape[0] * (s.shape[1] - 1) for s in states)
        kl, nll, gradients = [], [], []
        name = self.vocabulary.head
        weight = None if name is None else self.vocabulary_weight(name, assignment).clone().requires_grad_(True)
        of_weight = None if weight is None else torch.zeros_like(weight)
        for ours, teacher, ids in self._beside_teacher(states, rows):
            ours = ours.detach().clone().requires_grad_(True)
            q = self._predict(ours, weight)
            divergence, surprise = kl_by_token(teacher, q), surprise_by_token(q, ids)
            inputs = [ours] if weight is None else [ours, weight]
            found = torch.autograd.grad(divergence.sum() / positions, inputs)
            kl.append(divergence.detach().double().mean(-1))
            nll.append(surprise.detach().double().mean(-1))
            gradients.append(found[0])
            if of_weight is not None:
                of_weight += found[1]
        return Losses(torch.cat(kl).cpu(), torch.cat(nll).cpu()), gradients, of_weight

    def block(self, index: int) -> tuple[nn.Module, BlockCandidates]:
        """Decoder block `index` with the source's weights, and its candidates."""
        if index in self._blocks:
            return self._blocks[index]
        block = self.stream.block(index)
        candidates = BlockCandidates(self.stream.inventory, self.stream, self.bank, index, block)
        needed = sum(p.nbytes for p in block.parameters()) + candidates.kept_bytes
        if needed <= self._free[0]:
            self._free[0] -= needed
            self._blocks[index] = block, candidates
        return block, candidates

    def weights(self, index: int, assignment: Assignment) -> dict[str, Tensor]:
        """The weights of the modules of block `index` that have candidates, by parameter name."""
        _, candidates = self.block(index)
        return {
            f"{local}.weight": candidates.weight(local, _number(candidates.formats[local], _bits(assignment, name)))
            for local, name in self._local[index].items()
        }

    def vocabulary_weight(self, name: str, assignment: Assignment) -> Tensor:
        """The weight of a module outside the blocks that has candidates."""
        return self.vocabulary.weight(name, _number(self.vocabulary.formats[name], _bits(assignment, name)))


def _number(formats: list[ModuleFormat], bits: int) -> int:
    return next(i for i, form in enumerate(formats) if form.num_bits == bits)


def _bits(assignment: Assignment, name: str) -> int:
    form = assignment.get(name)
    return 16 if form is None else form.num_bits
