"""What `gamma sweep` calls: budgets solved, measured if asked, and GPUs marked on the axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.pipeline.measure import KL_UNIT, MeasureSettings, measure_assignments
from allocator.plan.gpus import Device
from allocator.plan.plan import make_plan
from allocator.plan.schema import Plan, PlanRequest
from allocator.plan.weights import PlannedModel
from allocator.report.pareto import Mark, Sweep, key_of_point, key_of_uniform
from allocator.report.recorded import Recorded, recorded_loss
from allocator.run.progress import Progress, silent
from allocator.solve.many_budgets import SolvedBudget, UniformPlan, solve_budgets, spread_budgets, uniform_plans
from allocator.solve.per_rank import solve_resident
from allocator.solve.program import Program, Solution
from allocator.solve.request import SolveSettings, average_bits_of
from allocator.solve.units import NO_RULES, Fusion, Rules

__all__ = ["HOURS_A_MONTH", "GpuSettings", "SweepSettings", "run_sweep"]

HOURS_A_MONTH = 730


@dataclass(frozen=True)
class GpuSettings:
    """GPUs by the name that was given, the model and the traffic to plan for, and $ a GPU-hour where known."""

    devices: Mapping[str, Device]
    model: PlannedModel
    request: PlanRequest
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSettings:
    """`points` budgets from `lowest` to `highest` (`2.25bits`, `5.9GiB`), and how each is solved. With `gpus` the range
    may be left out: it is then that of the GPUs. `manifests` of the same scores tell what was measured before."""

    lowest: str | None = None
    highest: str | None = None
    points: int = 20
    rules: Rules = NO_RULES
    fusion: Fusion = "free"
    relative_gap: float = 0.0
    gpus: GpuSettings | None = None
    measure: MeasureSettings | None = None
    manifests: Sequence[Manifest] = ()


def run_sweep(scores: Scores, request: SweepSettings, progress: Progress = silent) -> Sweep:
    """Solve, measure and mark. Raises InputError for a request that makes no sense, InfeasibleBudgetError for a budget
    that no assignment fits."""
    if request.relative_gap < 0:
        raise InputError(f"--relative-gap {request.relative_gap}: must be at least 0")
    recorded = [_recorded(manifest, scores) for manifest in request.manifests]
    program = Program.of(scores, request.rules, request.fusion)
    uniform = uniform_plans(scores)
    marks = [] if request.gpus is None else _marks(scores, request, request.gpus, uniform, progress)
    budgets = _budgets(scores, request, marks)
    points = solve_budgets(program, budgets, request.relative_gap, progress) if budgets else []
    solved = [*points, *(mark.point for mark in marks if mark.point is not None)]
    if not solved:
        raise InfeasibleBudgetError("; ".join(f"{mark.gpu}: {mark.message}" for mark in marks))
    measured: dict[str, float] = {}
    if request.measure is not None:
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
        recorded=recorded,
    )


def _recorded(manifest: Manifest, scores: Scores) -> Recorded:
    found = recorded_loss(manifest, scores)
    if found is None:
        raise InputError(f"manifest {manifest.digest} has no measured loss; `gamma solve --verify` records one")
    return found


def _budgets(scores: Scores, request: SweepSettings, marks: Sequence[Mark]) -> list[int]:
    """The budgets of the curve: those asked for, else between the smallest and the largest assignment of a GPU."""
    if request.lowest is not None and request.highest is not None:
        return spread_budgets(scores, request.lowest, request.highest, request.points)
    if request.lowest is not None or request.highest is not None or request.gpus is None:
        raise InputError("give --from and --to, for example --from 2.25bits --to 4.5bits, or --gpus")
    sizes = sorted({mark.point.solution.tensor_bytes for mark in marks if mark.point is not None})
    if len(sizes) < 2:
        return []
    return spread_budgets(scores, str(sizes[0]), str(sizes[-1]), request.points)


def _marks(
    scores: Scores, request: SweepSettings, gpus: GpuSettings, uniform: Sequence[UniformPlan], progress: Progress
) -> list[Mark]:
    unknown = sorted(gpus.prices.keys() - gpus.devices.keys())
    if unknown:
        raise InputError(f"--price {unknown[0]}: no such GPU in --gpus {','.join(gpus.devices)}")
    ranks = gpus.request.tensor_parallel_size * gpus.request.pipeline_parallel_size
    marks = []
    for name, device in progress.over(gpus.devices.items(), "planning for GPUs", "GPU"):
        point, budget, message = _fill(scores, request, gpus, device, uniform)
        price = gpus.prices.get(name)
        marks.append(Mark(name, budget, point, message, None if price is None else price * ranks * HOURS_A_MONTH))
    return marks


def _fill(
    scores: Scores, request: SweepSettings, gpus: GpuSettings, device: Device, uniform: Sequence[UniformPlan]
) -> tuple[SolvedBudget | None, int, str]:
    """What a GPU leaves for the weights of a rank, the best assignment in it, and why there is none."""
    try:
        plan = make_plan(gpus.model.shape, device, gpus.request, model=gpus.model.name)
    except InputError as error:
        return None, 0, str(error)
    if plan.weight_budget_bytes <= 0:
        return None, plan.weight_budget_bytes, plan.verdict.message
    settings = SolveSettings(rules=request.rules, fusion=request.fusion)
    try:
        manifest = solve_resident(
            scores, settings, plan.residency, plan.weight_budget_bytes, f"plan for {plan.device.name}"
        )
    except InfeasibleBudgetError:
        return None, plan.weight_budget_bytes, plan.verdict.message
    return _point(scores, manifest, plan, uniform), plan.weight_budget_bytes, ""


def _point(scores: Scores, manifest: Manifest, plan: Plan, uniform: Sequence[UniformPlan]) -> SolvedBudget:
    """The assignment of a manifest, and the best uniform plan whose weights fit on every rank too."""
    assert manifest.proof is not None
    proof = manifest.proof
    solution = Solution(manifest.modules, proof.objective, proof.bound, proof.gap, proof.solver, manifest.tensor_bytes)
    budget = plan.weight_budget_bytes
    fitting = [u for u in uniform if max(plan.residency.stage_bytes(u.assignment)) <= budget]
    best = min(fitting, key=lambda u: u.objective) if fitting else None
    return SolvedBudget(budget, solution, average_bits_of(scores, manifest.tensor_bytes), best)
