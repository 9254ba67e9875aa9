"""Stage I: the scores of every candidate, by one of the methods."""

from collections.abc import Callable

from torch import Tensor

from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.candidates.reader import BankReader
from allocator.contract.errors import InputError
from allocator.contract.scores import Scores
from allocator.inventory import Inventory
from allocator.learning.methods import METHODS, Task
from allocator.learning.settings import LearningSettings
from allocator.learning.tables import Table, make_scores
from allocator.progress import Progress, silent
from allocator.running import Journal

__all__ = ["learn_scores"]


def learn_scores(
    inventory: Inventory,
    stream: BlockStream,
    bank: BankReader,
    token_ids: Tensor,
    hidden: HiddenStates,
    settings: LearningSettings,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Scores:
    """Scores of every candidate by `settings.method`; `hidden` holds the teacher's states of all boundaries on
    the calibration text `token_ids`, int64 `[S, T]`.

    Steps that `journal` has are taken from it. Raises InputError for an unknown method.
    """
    method: Callable[[Task], Table] | None = METHODS.get(settings.method)
    if method is None:
        raise InputError(f"method {settings.method!r} is not known; choose from {', '.join(METHODS)}")
    table = method(Task(inventory, stream, bank, token_ids, hidden, settings, progress, journal or Journal.nowhere()))
    return make_scores(inventory, bank, settings, table)
