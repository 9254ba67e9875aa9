"""What `gamma sweep` calls: budgets solved, measured if asked, and GPUs marked on the axis."""

from dataclasses import dataclass, field

from allocator.contract.errors import InputError
from allocator.contract.scores import Scores
from allocator.progress import Progress, silent
from allocator.reporting.pareto import Mark, Sweep
from allocator.solving.program import Program, Solver
from allocator.solving.sweep import SweepPoint, spread_budgets, sweep, uniform_plans
from allocator.solving.units import Fusion, Rules

__all__ = ["SweepRequest", "run_sweep"]


@dataclass(frozen=True)
class SweepRequest:
    """`points` budgets from `lowest` to `highest` (`2.25bits`, `5.9GiB`), and how each is solved."""

    lowest: str | None = None
    highest: str | None = None
    points: int = 20
    rules: Rules = field(default_factory=lambda: Rules({}, {}, {}))
    fusion: Fusion = "free"
    solver: Solver = "highs"
    relative_gap: float = 0.0


def run_sweep(scores: Scores, request: SweepRequest, progress: Progress = silent) -> Sweep:
    """Solve, measure and mark. Raises InputError for a request that makes no sense, InfeasibleBudgetError for a budget
    that no assignment fits."""
    if request.relative_gap < 0:
        raise InputError(f"--relative-gap {request.relative_gap}: must be at least 0")
    program = Program.of(scores, request.rules, request.fusion)
    marks: list[Mark] = []
    points: list[SweepPoint] = []
    if request.lowest is None or request.highest is None:
        raise InputError("give --from and --to, for example --from 2.25bits --to 4.5bits")
    budgets = spread_budgets(scores, request.lowest, request.highest, request.points)
    points = sweep(program, budgets, request.solver, request.relative_gap, progress)
    return Sweep(
        model=scores.model.name,
        unit=scores.unit,
        points=points,
        uniform=uniform_plans(scores),
        marks=marks,
        measured={},
    )
