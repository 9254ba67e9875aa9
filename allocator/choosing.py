"""`--kv-cache-dtype auto-choose` of `gamma fit` and `prepare`: the dtype that costs least together with the weights."""

from collections.abc import Callable

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.kv_cache import KvCacheScores
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.fitting.document import Plan
from allocator.solving import SolveSettings, solve_resident
from allocator.solving.joint import KvOption, check_kv_scores, choose_kv_cache, kv_losses

__all__ = ["choose_kv_dtype"]


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
