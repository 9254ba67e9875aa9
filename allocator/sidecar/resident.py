"""An assignment for a plan, whose budget is bytes that a rank holds after loading, not bytes of the checkpoint."""

from typing import Any

from allocator.contract.errors import InfeasibleBudgetError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.fitting import Plan
from allocator.fitting.weights import weight_sizes
from allocator.inventory.shape import read_shape
from allocator.solving import SolveSettings, solve_scores

__all__ = ["solve_for_plan"]

_MOST_STEPS = 8


def solve_for_plan(
    scores: Scores, settings: SolveSettings, plan: Plan, config: dict[str, Any], seconds: float = 60.0
) -> Manifest:
    """The best assignment found whose weights fit `plan.weight_budget_bytes` on the tightest rank.

    Solves for a budget of the checkpoint and corrects it by what a rank holds more or less than its share, until it
    fits and no more than a thousandth is unused. Raises InfeasibleBudgetError.
    """
    budget, ranks = plan.weight_budget_bytes, plan.request.tensor_parallel_size
    shape = read_shape(config)
    sizes = weight_sizes(shape, plan.request, 128, False)
    low, _high = scores.feasible_bytes()
    asked = max(budget * ranks, low)
    best: Manifest | None = None
    for _ in range(_MOST_STEPS):
        manifest = solve_scores(
            scores,
            SolveSettings(
                budget=str(asked), pins=settings.pins, ceilings=settings.ceilings, floors=settings.floors,
                fusion=settings.fusion, solver=settings.solver,
            ),
            seconds / _MOST_STEPS,
        )  # fmt: skip
        resident = sizes.of_formats(manifest.modules)
        spare = budget - resident
        if spare >= 0 and (best is None or manifest.tensor_bytes > best.tensor_bytes):
            best = manifest
        if 0 <= spare <= budget // 1000 or (spare > 0 and manifest.tensor_bytes < asked - asked // 1000):
            break
        step = spare * ranks
        if best is not None and spare < 0:
            asked = (asked + best.tensor_bytes) // 2
        else:
            asked = max(min(asked, manifest.tensor_bytes) + step, low)
    if best is None:
        raise InfeasibleBudgetError(
            f"no assignment has at most {budget} bytes of weights on a rank; plan for less context, fewer sequences, "
            "an fp8 KV cache or a larger GPU"
        )
    return best
