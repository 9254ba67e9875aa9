"""A model on its calibration text: what building candidates and learning scores are both given."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from allocator.blocks.calibration import Calibration
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.model import Inventory
from allocator.run.journal import Journal
from allocator.run.progress import Progress, silent

__all__ = ["CalibrationRun"]


@dataclass(frozen=True)
class CalibrationRun:
    """`hidden` has the teacher's states on the text, or the room for them.

    Steps that `journal` has in its sections ("states": boundaries of `hidden`; one for each kind of work) are not done
    again. Without one nothing is kept, for short work.
    """

    stream: BlockStream
    calibration: Calibration
    hidden: HiddenStates
    progress: Progress = silent
    journal: Journal = field(default_factory=Journal.nowhere)

    @property
    def inventory(self) -> Inventory:
        return self.stream.inventory

    @property
    def token_ids(self) -> Tensor:
        """int64 `[S, T]`."""
        return self.calibration.token_ids

    @property
    def states(self) -> Journal:
        return self.journal.section("states")

    def of(self, inventory: Inventory) -> "CalibrationRun":
        """The same for `inventory`, which is of the same model with its channels in another order."""
        return replace(self, stream=BlockStream(inventory, self.stream.device))

    def fill(self) -> None:
        """Put the teacher's states into `hidden`."""
        self.stream.fill(self.hidden, self.token_ids, self.progress, self.states)
