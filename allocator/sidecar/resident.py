"""An assignment for a plan, whose budget is bytes that a rank holds after loading, not bytes of the checkpoint."""

from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.fitting import Plan
from allocator.solving import SolveSettings, solve_resident

__all__ = ["solve_for_plan"]


def solve_for_plan(scores: Scores, settings: SolveSettings, plan: Plan, seconds: float = 60.0) -> Manifest:
    """The best assignment whose weights fit `plan.weight_budget_bytes` on the tightest rank.

    Raises InfeasibleBudgetError.
    """
    requested = f"plan for {plan.device.name}"
    return solve_resident(scores, settings, plan.residency, plan.weight_budget_bytes, requested, seconds)
