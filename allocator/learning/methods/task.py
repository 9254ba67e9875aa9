"""What every method is given."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from allocator.blocks.gradients import descend
from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.candidates.block import BlockCandidates
from allocator.candidates.reader import BankReader
from allocator.inventory import Inventory
from allocator.learning.settings import LearningSettings
from allocator.learning.teacher import Teacher
from allocator.progress import Progress
from allocator.running import Journal

__all__ = ["Task"]


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

    def descend(self, what: str) -> Iterator[tuple[int, Teacher]]:
        """Numbers of all blocks from the last to the first, and the teacher with the gradients at that block's output.

        They are there until the next number is asked for: what is learned of a block goes into the journal before.
        """
        settings = self.settings
        teacher = Teacher.over(self.hidden, settings.draws)
        below = descend(self.stream, self.hidden, teacher.gradients, settings.seed, self.journal)
        self.progress(what, 0.0)
        for index in below:
            yield index, teacher
            self.progress(what, 1 - index / self.stream.blocks)

    def blocks(self, what: str) -> Iterator[int]:
        """Numbers of all blocks, with progress."""
        for index in range(self.stream.blocks):
            self.progress(what, index / self.stream.blocks)
            yield index
        self.progress(what, 1.0)

    def module(self, index: int, local: str) -> str:
        """Full name of a module of block `index`."""
        return self.inventory.block_prefix(index) + local

    def candidates(self, index: int, block: nn.Module) -> BlockCandidates:
        return BlockCandidates(self.inventory, self.stream, self.bank, index, block)
