"""KV cache and weights out of one memory budget: the dtype of the KV cache is one more choice of the program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allocator.contract.errors import ContractError, InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import KvCacheScores, Scores
from allocator.plan.schema import Plan
from allocator.solve.per_rank import solve_resident
from allocator.solve.request import SolveSettings

__all__ = [
    "KvOption",
    "check_kv_scores",
    "choose_kv_cache",
    "choose_kv_dtype",
    "kv_losses",
]


@dataclass(frozen=True)
class KvOption:
    """One dtype of the KV cache: what it costs, and the best weights beside it (None: `message` says why none)."""

    dtype: str
    kv_loss: float
    manifest: Manifest | None
    message: str = ""

    @property
    def total_loss(self) -> float | None:
        """Predicted loss of KV cache and weights together; None if nothing fits."""
        if self.manifest is None or self.manifest.proof is None:
            return None
        return self.kv_loss + self.manifest.proof.objective


def kv_losses(measured: KvCacheScores) -> dict[str, float]:
    """Loss by dtype, "auto" (the model's own) included."""
    return {"auto": 0.0} | dict(measured.losses)


def check_kv_scores(measured: KvCacheScores, scores: Scores) -> None:
    """Raises ContractError unless both are of one model."""
    if measured.model.digest != scores.model.digest:
        raise ContractError(
            f"the losses of the KV cache are of model {measured.model.name} ({measured.model.digest}), the scores of "
            f"{scores.model.name} ({scores.model.digest}); measure them for this model (`gamma kv`)"
        )


def choose_kv_cache(losses: Mapping[str, float], solve: Callable[[str], Manifest]) -> tuple[KvOption, list[KvOption]]:
    """The dtype whose total predicted loss is least, and all options in the order of `losses`.

    `solve(dtype)` gives the best assignment in what a KV cache of `dtype` leaves, or raises InfeasibleBudgetError.
    Equal totals go to the dtype that costs less itself. Raises InfeasibleBudgetError when nothing fits with any.
    """
    options = []
    for dtype, loss in losses.items():
        try:
            options.append(KvOption(dtype, loss, solve(dtype)))
        except InfeasibleBudgetError as error:
            options.append(KvOption(dtype, loss, None, str(error)))
    known = [(total, option.kv_loss, i) for i, option in enumerate(options) if (total := option.total_loss) is not None]
    if not known:
        reasons = "; ".join(f"{option.dtype}: {option.message}" for option in options)
        raise InfeasibleBudgetError(f"no KV cache dtype leaves enough for the weights ({reasons})")
    return options[min(known)[2]], options


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
