"""Stage I: the scores of every candidate, by one of the methods."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from allocator.blocks.finite import require_finite
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.contract.errors import InputError
from allocator.contract.scores import Scores
from allocator.model import Inventory
from allocator.quantize.bank_reader import BankReader
from allocator.run.journal import Journal
from allocator.run.progress import Progress, silent
from allocator.score.expert_counts import count_expert_tokens, tell_hardly_seen, with_credibility
from allocator.score.methods import METHODS, Task
from allocator.score.settings import LearningSettings
from allocator.score.tables import Table, make_scores

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

    Scores of experts are drawn towards those of the others the fewer tokens chose them (see `learning.experts`), and
    those hardly seen are told. Steps that `journal` has are taken from it. Raises InputError for an unknown method, and
    for scores that are not finite.
    """
    method: Callable[[Task], Table] | None = METHODS.get(settings.method)
    if method is None:
        raise InputError(f"method {settings.method!r} is not known; choose from {', '.join(METHODS)}")
    task = Task(inventory, stream, bank, token_ids, hidden, settings, progress, journal or Journal.nowhere())
    counts = {} if settings.method == "uniform" else count_expert_tokens(task)  # it looks at no text
    few = tell_hardly_seen(counts, token_ids.numel())
    table = method(task)
    for name, scores in table.scores.items():
        widths = ", ".join(f"{f.num_bits} bits {s:g}" for f, s in zip(bank.formats(name), scores.tolist(), strict=True))
        require_finite(scores, f"{name}: its scores by {settings.method} ({widths})")
    outcome = table.outcome | ({"hardly_seen_experts": few} if few else {})
    return make_scores(
        inventory, bank, settings, replace(table, scores=with_credibility(table.scores, counts), outcome=outcome)
    )
