"""What `gamma fit --kv-cache-dtype auto-choose` calls: the dtype of the KV cache chosen together with the weights."""

from collections.abc import Callable
from pathlib import Path

from allocator.contract.errors import ContractError, InfeasibleBudgetError, InputError
from allocator.contract.kv_cache import KV_CACHE_NAME, KvCacheScores
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.fitting.document import Plan
from allocator.measuring import measure_kv_losses
from allocator.pipeline import CandidateSettings
from allocator.progress import Progress, silent
from allocator.solving import SolveSettings, solve_resident
from allocator.solving.joint import KvOption, check_kv_scores, choose_kv_cache, kv_losses

__all__ = ["choose_kv_dtype", "kv_scores_of"]

_SEQUENCES, _SEQUENCE_LENGTH = 16, 512


def kv_scores_of(
    model: Path, work: Path, scores: Scores, candidates: CandidateSettings, progress: Progress = silent
) -> KvCacheScores:
    """The losses of the KV cache in the work folder, measured on the calibration text if they are not there yet."""
    path = work / KV_CACHE_NAME
    try:
        known = KvCacheScores.read(path)
        if known.model.digest == scores.model.digest:
            return known
    except ContractError:
        pass  # absent or damaged: measured
    length = min(candidates.sequence_length, _SEQUENCE_LENGTH)
    count = min(candidates.sequences, _SEQUENCES)
    measured = measure_kv_losses(model, candidates.calibration, count, length, candidates.seed, work, progress)
    measured.write(path)
    return measured


def choose_kv_dtype(
    scores: Scores, measured: KvCacheScores, settings: SolveSettings, plan_for: Callable[[str], Plan]
) -> tuple[KvOption, list[KvOption]]:
    """The dtype of least total predicted loss, and all options; `plan_for(dtype)` plans the GPU with such a KV cache.

    A dtype that the GPU cannot have or that leaves too little for the weights is no option. Raises
    InfeasibleBudgetError when none is left, ContractError when the losses are of another model.
    """
    check_kv_scores(measured, scores)

    def best_in(dtype: str) -> Manifest:
        try:
            plan = plan_for(dtype)
        except InputError as error:
            raise InfeasibleBudgetError(str(error)) from None
        if plan.weight_budget_bytes <= 0:
            raise InfeasibleBudgetError(plan.verdict.message)
        requested = f"plan for {plan.device.name}"
        return solve_resident(scores, settings, plan.residency, plan.weight_budget_bytes, requested)

    return choose_kv_cache(kv_losses(measured), best_in)
