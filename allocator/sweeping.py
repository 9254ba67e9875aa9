"""What `gamma sweep` calls: budgets solved, measured if asked, and GPUs marked on the axis."""

from dataclasses import dataclass, field

from allocator.contract.errors import InputError
from allocator.contract.scores import Scores
from allocator.measuring import KL_UNIT, MeasureSettings, measure_assignments
from allocator.progress import Progress, silent
from allocator.reporting.pareto import Mark, Sweep, key_of_point, key_of_uniform
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
    solver: Solver = "dynamic"
    relative_gap: float = 0.0
    measure: MeasureSettings | None = None


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
    uniform = uniform_plans(scores)
    measured: dict[str, float] = {}
    if request.measure is not None:
        solved = [*points, *(mark.point for mark in marks if mark.point is not None)]
        assignments = {key_of_point(point): point.solution.assignment for point in solved}
        wanted = {point.uniform.num_bits for point in solved if point.uniform is not None}
        assignments |= {key_of_uniform(plan): plan.assignment for plan in uniform if plan.num_bits in wanted}
        measured = measure_assignments(scores, assignments, request.measure, progress)
    return Sweep(
        model=scores.model.name,
        unit=scores.unit,
        points=points,
        uniform=uniform,
        marks=marks,
        measured=measured,
        measured_unit=f"{KL_UNIT}, on text that was not calibrated on" if measured else "",
    )
