"""Many budgets at once: what each buys, beside the uniform plans that fit it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import Candidate, Scores
from allocator.run.progress import Progress, silent
from allocator.solve.predicted import predicted_loss
from allocator.solve.program import Program, SearchLimits, Solution
from allocator.solve.request import average_bits_of, parse_amount

__all__ = [
    "MOST_POINTS",
    "SolvedBudget",
    "UniformPlan",
    "best_uniform",
    "solve_budgets",
    "spread_budgets",
    "uniform_plans",
]

MOST_POINTS = 10_000


@dataclass(frozen=True)
class UniformPlan:
    """Every module that has a choice at `num_bits` (or the next width it has): exact bytes and predicted loss."""

    num_bits: int
    assignment: dict[str, ModuleFormat]
    tensor_bytes: int
    objective: float
    average_bits: float


@dataclass(frozen=True)
class SolvedBudget:
    """A budget, the best assignment in it, and the best uniform plan in it (None: not even the narrowest fits)."""

    budget_bytes: int
    solution: Solution
    average_bits: float
    uniform: UniformPlan | None


def spread_budgets(scores: Scores, lowest: str, highest: str, points: int) -> list[int]:
    """`points` budgets in bytes, spread evenly from `lowest` to `highest` (`2.25bits`, `5.9GiB`), both included.

    Raises InputError when there is no range, or fewer than 2 or more than `MOST_POINTS` points.
    """
    if not 2 <= points <= MOST_POINTS:
        raise InputError(f"--points {points}: allowed are 2 to {MOST_POINTS}")
    low, high = parse_amount(lowest, scores), parse_amount(highest, scores)
    if low >= high:
        raise InputError(f"the range from {lowest} ({low} bytes) to {highest} ({high} bytes) is empty; swap the two")
    return [low + (high - low) * i // (points - 1) for i in range(points)]


def solve_budgets(
    program: Program,
    budgets: Sequence[int],
    relative_gap: float = 0.0,
    progress: Progress = silent,
) -> list[SolvedBudget]:
    """Solve `program` at every budget in bytes. Raises InfeasibleBudgetError for one that no assignment fits."""
    plans = uniform_plans(program.scores)
    limits, points = SearchLimits(relative_gap=relative_gap), []
    for budget in progress.over(budgets, "solving", "budget"):
        solution = program.solve(budget, limits)
        bits = average_bits_of(program.scores, solution.tensor_bytes)
        points.append(SolvedBudget(budget, solution, bits, best_uniform(plans, budget)))
    return points


def uniform_plans(scores: Scores) -> list[UniformPlan]:
    """The plan of each width that a module has, narrowest first. A module without it takes its next wider one."""
    widths = {c.format.num_bits for m in scores.modules.values() if len(m.candidates) > 1 for c in m.candidates}
    return [_uniform(scores, bits) for bits in sorted(widths)]


def best_uniform(plans: Sequence[UniformPlan], budget_bytes: int) -> UniformPlan | None:
    """The plan of least predicted loss that fits `budget_bytes`; None if none does."""
    fitting = [plan for plan in plans if plan.tensor_bytes <= budget_bytes]
    return min(fitting, key=lambda plan: plan.objective) if fitting else None


def _uniform(scores: Scores, bits: int) -> UniformPlan:
    chosen = {name: _at_least(module.candidates, bits) for name, module in scores.modules.items()}
    assignment = {name: c.format for name, c in chosen.items()}
    total = scores.other_bytes + sum(c.nbytes for c in chosen.values())
    return UniformPlan(
        num_bits=bits,
        assignment=assignment,
        tensor_bytes=total,
        objective=predicted_loss(scores, assignment),
        average_bits=average_bits_of(scores, total),
    )


def _at_least(candidates: Sequence[Candidate], bits: int) -> Candidate:
    ordered: Mapping[int, Candidate] = {c.format.num_bits: c for c in candidates}
    wider = [b for b in sorted(ordered) if b >= bits]
    return ordered[wider[0] if wider else max(ordered)]
