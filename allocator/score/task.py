"""What every method is given."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from allocator.blocks.gradients import backward_by_block, finish_boundary, keep_gradient
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.model import Inventory
from allocator.quantize.bank_reader import BankReader
from allocator.quantize.candidates import BlockCandidates, VocabularyCandidates
from allocator.run.journal import Journal
from allocator.run.progress import Progress
from allocator.score.settings import LearningSettings
from allocator.score.swaps import measure_swaps
from allocator.score.teacher import Teacher
from allocator.score.vocabulary import Text, measure_vocabulary

__all__ = ["Task"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Task:
    """The model, its candidates, the calibration text (int64 `[S, T]`), and the teacher's states on it in `hidden`."""

    inventory: Inventory
    stream: BlockStream
    bank: BankReader
    token_ids: Tensor
    hidden: HiddenStates
    settings: LearningSettings
    progress: Progress
    journal: Journal

    def backward_by_block(self, what: str, vocabulary: bool = False) -> Iterator[tuple[int, Teacher]]:
        """Numbers of all blocks from the last to the first, and the teacher with the gradients at that block's output.

        They are there until the next number is asked for: what is learned of a block goes into the journal before.
        With `vocabulary`, and if any module outside the blocks has candidates, -1 comes last, with the gradients at the
        embedding's output.
        """
        settings = self.settings
        teacher = Teacher.over(self.hidden, settings.draws)
        outside = vocabulary and bool(self.vocabulary().formats)
        progress = self.progress
        below = backward_by_block(
            self.stream, self.hidden, teacher.gradients, settings.seed, self.journal, outside, progress
        )
        for done, index in enumerate(below):
            if done == 0:
                progress.begin(what, self.stream.blocks, "block")
            if index < 0:
                progress.begin(f"{what} the vocabulary")
            yield index, teacher
            progress.reach(1 if index < 0 else done + 1)

    def once(self, step: str, compute: Callable[[], Found]) -> Found:
        """One unit of progress: the state of `step` as the journal has it, or that of `compute()`, which is kept."""
        state: Found | None = self.journal.load(step)
        if state is None:
            return self.journal.once(step, compute)
        self.progress.skip()
        return state

    def module(self, index: int, local: str) -> str:
        """Full name of a module of block `index`."""
        return self.inventory.block_prefix(index) + local

    def candidates(self, index: int, block: nn.Module) -> BlockCandidates:
        return BlockCandidates(self.inventory, self.stream, self.bank, index, block)

    def vocabulary(self) -> VocabularyCandidates:
        """The candidates of the modules outside the blocks."""
        return VocabularyCandidates(self.inventory, self.stream, self.bank)

    def measure(
        self, teacher: Teacher, index: int, parts: Mapping[int, Tensor], reduce: Callable[[Tensor], Found]
    ) -> dict[int, dict[str, Found]]:
        """`measure_swaps` of block `index`, or `measure_vocabulary` for -1, on the sequences of each of `parts`: by
        module, with its full name."""
        if index < 0:
            text = Text(teacher, self.token_ids, self.settings.seed, parts)
            return measure_vocabulary(self.stream, self.bank, self.vocabulary(), text, reduce, progress=self.progress)
        block = self.stream.block(index)
        readers = {number: partial(teacher.batch, self.stream, index, rows) for number, rows in parts.items()}
        candidates = self.candidates(index, block)
        group, wanted = self.journal.process_group, index > 0 or bool(self.vocabulary().formats)
        kept: set[int] = set()

        def below(number: int, probe: int, gradient: Tensor) -> None:
            keep_gradient(teacher.gradients[probe], index, parts[number], gradient)
            kept.add(number)

        found = measure_swaps(
            self.stream,
            block,
            candidates,
            readers,
            reduce,
            self.progress,
            process_group=group,
            below=below if wanted else None,
        )
        if wanted and not group.any(kept != set(parts)):
            finish_boundary(teacher.gradients, index, self.journal, may_stop=False)  # the measurements are kept first
        return {n: {self.module(index, local): f for local, f in of.items()} for n, of in found.items()}

    def in_model_order(self, scores: dict[str, Found]) -> dict[str, Found]:
        """`scores` by module, in the order of the model: that of the interactions in the scores file."""
        return {m.name: scores[m.name] for m in self.inventory.modules if m.name in scores}
