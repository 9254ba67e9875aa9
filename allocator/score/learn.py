"""Stage I: the scores of every candidate, by one of the methods."""

from collections.abc import Callable
from dataclasses import replace

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.contract.errors import InputError
from allocator.contract.scores import Scores
from allocator.quantize.bank_reader import BankReader
from allocator.score.expert_counts import count_expert_tokens, tell_hardly_seen, with_credibility
from allocator.score.methods import METHODS, Task
from allocator.score.settings import LearningSettings
from allocator.score.tables import Table, make_scores

__all__ = ["learn_scores"]


def learn_scores(run: CalibrationRun, bank: BankReader, settings: LearningSettings) -> Scores:
    """Scores of every candidate of `bank` by `settings.method`; `run.hidden` holds the teacher's states of all
    boundaries.

    Scores of experts are drawn towards those of the others the fewer tokens chose them (see `learning.experts`), and
    those hardly seen are told. Steps that the section "learning" of the run's journal has are taken from it. Raises
    InputError for an unknown method, and for scores that are not finite.
    """
    method: Callable[[Task], Table] | None = METHODS.get(settings.method)
    if method is None:
        raise InputError(f"method {settings.method!r} is not known; choose from {', '.join(METHODS)}")
    journal = run.journal.section("learning")
    task = Task(run.inventory, run.stream, bank, run.token_ids, run.hidden, settings, run.progress, journal)
    counts = {} if settings.method == "uniform" else count_expert_tokens(task)  # it looks at no text
    few = tell_hardly_seen(counts, run.token_ids.numel())
    table = method(task)
    for name, scores in table.scores.items():
        widths = ", ".join(f"{f.num_bits} bits {s:g}" for f, s in zip(bank.formats(name), scores.tolist(), strict=True))
        require_finite(scores, f"{name}: its scores by {settings.method} ({widths})")
    outcome = table.outcome | ({"hardly_seen_experts": few} if few else {})
    return make_scores(
        run.inventory, bank, settings, replace(table, scores=with_credibility(table.scores, counts), outcome=outcome)
    )
