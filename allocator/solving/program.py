"""The integer program: one width for each module, least sum of scores, never a byte over the budget.

Solvers compute in floating point; the answer must not. So bytes are integers divided by their common
divisor, scores are scaled to the solver's range, every answer is counted anew in integers, and one that a
tolerance let over the budget is refused and the program given to CP-SAT, which computes in integers.
"""

import datetime
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ortools.math_opt.python import mathopt

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import Scores
from allocator.solving.budget import format_bytes
from allocator.solving.quiet import stdout_to_stderr
from allocator.solving.relaxation import Item, Picks, fill, relax, survivors, total_bytes, total_gain
from allocator.solving.units import Choice, Fusion, Rules, Unit, undominated, units_of

__all__ = ["Solution", "Solver", "solve"]

Solver = Literal["highs", "cp-sat", "scip"]

_SOLVERS = {
    "highs": mathopt.SolverType.HIGHS,
    "cp-sat": mathopt.SolverType.CP_SAT,
    "scip": mathopt.SolverType.GSCIP,
}
_LARGEST_GAIN = 2.0**13
"""Largest objective coefficient given to a floating-point solver, whose tolerances are absolute (1e-6)."""
_INTEGER_RANGE = 2.0**50
"""Sum of objective coefficients given to CP-SAT, which takes integers."""
_FIRST_CORE = 8
"""Choices of a first, small program, whose answer leaves fewer choices to the second, which proves."""
_RELATIVE_RESOLUTION = 1e-9
"""A gap below this part of the range of all scores is rounding, and reported as 0."""


@dataclass(frozen=True)
class Solution:
    """An assignment and its proof: no assignment within the budget has a sum of scores below `bound`.

    `gap` is `objective - bound` in the unit of the scores; 0 means proven best. `tensor_bytes` counts every
    tensor of the checkpoint.
    """

    assignment: dict[str, ModuleFormat]
    objective: float
    bound: float
    gap: float
    solver: str
    tensor_bytes: int


def solve(
    scores: Scores,
    budget_bytes: int,
    *,
    pins: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
    fusion: Fusion = "free",
    solver: Solver = "highs",
    time_limit_seconds: float = 60.0,
) -> Solution:
    """The assignment of least total score that has at most `budget_bytes` bytes, all tensors counted.

    `pins`, `ceilings` and `floors` give widths by fnmatch pattern of module names (see `Rules`). With
    `fusion` "tied" the modules of a fused group get one width. The same input gives the same answer, unless the time
    limit cuts the search; then the best assignment found is returned with the gap that is left. Of candidates
    of one score the smallest is taken. Raises InfeasibleBudgetError naming the feasible range, InputError for
    rules that cannot be kept.
    """
    if solver not in _SOLVERS:
        raise InputError(f"solver {solver!r} is not known; known are {', '.join(_SOLVERS)}")
    if fusion not in ("free", "tied"):
        raise InputError(f"fusion {fusion!r} is not known; known are free, tied")
    units = units_of(scores, Rules(pins or {}, ceilings or {}, floors or {}), fusion)
    smallest = scores.other_bytes + sum(unit.choices[0].nbytes for unit in units)
    if budget_bytes < smallest:
        raise InfeasibleBudgetError(_infeasible(scores, units, budget_bytes, smallest))

    choices = [undominated(unit.choices) for unit in units]
    scale = _power_of_two_scale(choices)
    items = [[Item(c.nbytes - cs[0].nbytes, scale * cs[0].score - scale * c.score) for c in cs] for cs in choices]
    picks, bound, used = _best_picks(items, budget_bytes - smallest, solver, time_limit_seconds)
    chosen = [cs[j] for cs, j in zip(choices, picks, strict=True)]
    return _solution(scores, units, chosen, (bound - total_gain(items, picks)) / scale, used)


def _best_picks(items: list[list[Item]], slack_bytes: int, solver: Solver, seconds: float) -> tuple[Picks, float, str]:
    """Best choice of each unit, an upper bound on the gain (the gain itself if proven), and the solver."""
    everything = [len(unit) - 1 for unit in items]
    if total_bytes(items, everything) <= slack_bytes:
        return everything, total_gain(items, everything), solver
    resolution = _RELATIVE_RESOLUTION * math.fsum(unit[-1].gain for unit in items)
    relaxed = relax(items, slack_bytes)
    picks, bound, used = relaxed.picks, relaxed.bound, ""
    deadline = time.monotonic() + seconds

    def search(name: str, at_most: int | None) -> float | None:
        """Improve `picks`; returns a bound on the gain, None if the solver has no answer within the budget."""
        nonlocal picks
        core = _Core.of(items, survivors(items, relaxed, picks, at_most), slack_bytes)
        found, core_bound = core.run(name, max(deadline - time.monotonic(), 0.1), picks)
        if found is not None:
            picks = max(picks, fill(items, found, slack_bytes), key=lambda p: total_gain(items, p))
        return None if found is None else core_bound

    search(solver, _FIRST_CORE)
    for name in dict.fromkeys((solver, "cp-sat")):
        used = f"{used}, {name}" if used else name
        proven = search(name, None)
        if proven is not None:
            bound = min(bound, proven)
            break
    gain = total_gain(items, picks)
    return picks, gain if bound - gain <= resolution else bound, used


@dataclass(frozen=True)
class _Core:
    """What is left of the program for the integer solver: units with more than one surviving choice."""

    items: list[list[Item]]
    kept: list[list[int]]
    slack_bytes: int
    open_units: list[int]
    divisor: int

    @classmethod
    def of(cls, items: list[list[Item]], kept: list[list[int]], slack_bytes: int) -> "_Core":
        open_units = [u for u, js in enumerate(kept) if len(js) > 1]
        steps = [items[u][j].nbytes - items[u][kept[u][0]].nbytes for u in open_units for j in kept[u]]
        floor = [js[0] for js in kept]
        return cls(items, kept, slack_bytes - total_bytes(items, floor), open_units, math.gcd(*steps) or 1)

    def run(self, solver: str, seconds: float, start: Picks) -> tuple[Picks | None, float]:
        """Picks within the budget (None if the solver has none) and an upper bound on the total gain."""
        floor = [js[0] for js in self.kept]
        if not self.open_units:
            return floor, total_gain(self.items, floor)
        scale = self._objective_scale(solver)
        model = mathopt.Model(name="gamma")
        variables: dict[tuple[int, int], Any] = {}
        bytes_used, gain, hint = [], [], mathopt.SolutionHint()
        for u in self.open_units:
            base, *better = self.kept[u]
            for j in better:
                x = variables[u, j] = model.add_binary_variable()
                step = self.items[u][j].nbytes - self.items[u][base].nbytes
                value = scale * (self.items[u][j].gain - self.items[u][base].gain)
                bytes_used.append(step // self.divisor * x)
                gain.append((round(value) if solver == "cp-sat" else value) * x)
                hint.variable_values[x] = float(start[u] == j)
            model.add_linear_constraint(mathopt.fast_sum([variables[u, j] for j in better]) <= 1)
        model.add_linear_constraint(mathopt.fast_sum(bytes_used) <= self.slack_bytes // self.divisor)
        model.maximize(mathopt.fast_sum(gain))
        with stdout_to_stderr():
            result = mathopt.solve(
                model,
                _SOLVERS[solver],
                params=_parameters(solver, seconds),
                model_params=mathopt.ModelSolveParameters(solution_hints=[hint]),
            )
        bound = total_gain(self.items, floor) + result.termination.objective_bounds.dual_bound / scale
        if not result.has_primal_feasible_solution():
            return None, bound
        values = result.variable_values()
        picks = list(floor)
        for (u, j), x in variables.items():
            if values[x] > 0.5:
                picks[u] = j
        fits = total_bytes(self.items, picks) - total_bytes(self.items, floor) <= self.slack_bytes
        return (picks if fits else None), bound

    def _objective_scale(self, solver: str) -> float:
        gains = [self.items[u][self.kept[u][-1]].gain - self.items[u][self.kept[u][0]].gain for u in self.open_units]
        target = _INTEGER_RANGE / math.fsum(gains) if solver == "cp-sat" else _LARGEST_GAIN / max(gains)
        return 2.0 ** math.floor(math.log2(min(target, 2.0**900)))


def _parameters(solver: str, seconds: float) -> Any:
    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=seconds),
        absolute_gap_tolerance=0.0,
        relative_gap_tolerance=0.0,
        random_seed=0,
        threads=None if solver == "highs" else 1,
    )
    if solver == "highs":
        parameters.highs.string_options["parallel"] = "off"
        for name in (
            "mip_feasibility_tolerance",
            "primal_feasibility_tolerance",
            "dual_feasibility_tolerance",
        ):
            parameters.highs.double_options[name] = 1e-9
    elif solver == "scip":
        parameters.gscip.real_params["numerics/feastol"] = 1e-9
    return parameters


def _power_of_two_scale(choices: list[tuple[Choice, ...]]) -> float:
    """Brings the largest score to about 1 without rounding, whatever its unit."""
    largest = max((abs(c.score) for cs in choices for c in cs), default=0.0)
    return math.ldexp(1.0, min(-math.frexp(largest)[1], 1023)) if largest else 1.0


def _solution(scores: Scores, units: list[Unit], chosen: list[Choice], gap: float, solver: str) -> Solution:
    formats = {
        name: form
        for unit, choice in zip(units, chosen, strict=True)
        for name, form in zip(unit.members, choice.formats, strict=True)
    }
    objective = math.fsum(
        c.score for name, m in scores.modules.items() for c in m.candidates if c.format == formats[name]
    )
    gap = max(gap, 0.0)
    return Solution(
        assignment={name: formats[name] for name in scores.modules},
        objective=objective,
        bound=objective - gap,
        gap=gap,
        solver=solver,
        tensor_bytes=scores.other_bytes + sum(choice.nbytes for choice in chosen),
    )


def _infeasible(scores: Scores, units: list[Unit], budget_bytes: int, smallest: int) -> str:
    largest = scores.other_bytes + sum(unit.choices[-1].nbytes for unit in units)
    fixed = scores.other_bytes + sum(unit.choices[0].nbytes for unit in units if len(unit.choices) == 1)
    return (
        f"budget {format_bytes(budget_bytes)} is below the smallest assignment {format_bytes(smallest)}; "
        f"feasible are {smallest} to {largest} bytes "
        f"({smallest / 2**30:.2f} to {largest / 2**30:.2f} GiB), "
        f"of which {fixed} bytes are fixed (tensors with one width only). "
        f"Raise the budget to at least {smallest} bytes, or allow narrower widths or a larger group size"
    )
