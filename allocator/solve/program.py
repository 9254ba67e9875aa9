"""The integer program: one width for each module, least sum of scores, never a byte over the budget.

A dynamic program finds and proves the answer in milliseconds; where it would have too many states, an integer solver
does. That one computes in floating point; the answer must not. So bytes are integers divided by their common
divisor, scores are scaled to the solver's range, every answer is counted anew in integers, and one that a
tolerance let over the budget is refused: then the best assignment found before stays, with its gap.
"""

import itertools
import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from allocator.contract.amounts import format_bytes
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import Scores
from allocator.solve.dynamic import MOST_STATES, improve
from allocator.solve.linear_relaxation import Item, Upgrade, fill, relax, survivors, total_bytes, total_gain, upgrades
from allocator.solve.mathopt import Core
from allocator.solve.quadratic import Quadratic, local_search, lower_bound, quadratic_of
from allocator.solve.units import NO_RULES, Choice, Fusion, Rules, Unit, undominated, units_of

__all__ = ["USUAL_LIMITS", "Program", "SearchLimits", "Solution", "solve"]

_FIRST_CORE = 8
"""Choices of a first, small program, whose answer leaves fewer choices to the second, which proves."""
_RELATIVE_RESOLUTION = 1e-9
"""A gap below this part of the range of all scores is rounding, and reported as 0."""
_WORTH_LEAVING = 0.0025
"""Part of the loss that leaving the best assignment by scores alone for the sake of pairs must promise: promises and
measurements of plans of one budget differ by a quarter of a percent or more (docs/allocation.md), so less is chance."""


@dataclass(frozen=True)
class Solution:
    """An assignment and its proof: no assignment within the budget has a loss below `bound`.

    The loss is the sum of scores, and of interactions if the scores have them. `gap` is `objective - bound` in the unit
    of the scores; 0 means proven best. `tensor_bytes` counts every tensor of the checkpoint. `cut`: the time limit
    ended the search before the best sum of scores was proven; a gap alone can be the bound's, which interactions widen.
    """

    assignment: dict[str, ModuleFormat]
    objective: float
    bound: float
    gap: float
    solver: str
    tensor_bytes: int
    cut: bool = False


@dataclass(frozen=True)
class SearchLimits:
    """When a search ends before its proof: after `time_limit_seconds`, or when its gap is proven to be at most
    `relative_gap` times the objective. A program for which the dynamic program would look at more than `most_states`
    states goes on to HiGHS."""

    time_limit_seconds: float = 60.0
    relative_gap: float = 0.0
    most_states: int = MOST_STATES


USUAL_LIMITS = SearchLimits()


def solve(
    scores: Scores,
    budget_bytes: int,
    rules: Rules = NO_RULES,
    fusion: Fusion = "free",
    limits: SearchLimits = USUAL_LIMITS,
) -> Solution:
    """The assignment of least total score that has at most `budget_bytes` bytes, all tensors counted.

    With `fusion` "tied" the modules of a fused group get one width. The same input gives the same answer, unless the
    time limit cuts the search; then the best assignment found is returned with the gap that is left. Of candidates of
    one score the smallest is taken. Raises InfeasibleBudgetError naming the feasible range, InputError for rules that
    cannot be kept.
    """
    return Program.of(scores, rules, fusion).solve(budget_bytes, limits)


@dataclass(frozen=True)
class Program:
    """The program of one set of scores and rules, made ready once for any number of budgets.

    Scores are multiplied by `scale`, a power of two. `items` are the choices of each unit that no other beats.
    """

    scores: Scores
    units: list[Unit]
    choices: list[tuple[Choice, ...]]
    scale: float
    items: list[list[Item]]
    upgrades: list[Upgrade]

    @classmethod
    def of(cls, scores: Scores, rules: Rules = NO_RULES, fusion: Fusion = "free") -> "Program":
        """Raises InputError for rules that cannot be kept."""
        if fusion not in ("free", "tied"):
            raise InputError(f"fusion {fusion!r} is not known; known are free, tied")
        units = units_of(scores, rules, fusion)
        choices = [undominated(unit.choices) for unit in units]
        scale = _power_of_two_scale(choices)
        items = [[Item(c.nbytes - cs[0].nbytes, scale * cs[0].score - scale * c.score) for c in cs] for cs in choices]
        return cls(scores, units, choices, scale, items, upgrades(items))

    @property
    def smallest_bytes(self) -> int:
        """Bytes of the smallest assignment."""
        return self.scores.other_bytes + sum(unit.choices[0].nbytes for unit in self.units)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest assignment."""
        return self.scores.other_bytes + sum(unit.choices[-1].nbytes for unit in self.units)

    def solve(self, budget_bytes: int, limits: SearchLimits = USUAL_LIMITS) -> Solution:
        """As `solve`."""
        smallest = self.smallest_bytes
        if budget_bytes < smallest:
            raise InfeasibleBudgetError(_infeasible(self, budget_bytes))
        search = _Search(self, budget_bytes - smallest, limits)
        search.run()
        chosen = [cs[j] for cs, j in zip(self.choices, search.picks, strict=True)]
        linear = _solution(self, chosen, max(search.missing, 0.0) / self.scale, search.used)
        linear = replace(linear, cut=search.cut)
        return linear if self.scores.interactions is None else self._with_interactions(chosen, budget_bytes, linear)

    @cached_property
    def quadratic(self) -> Quadratic:
        """The program with the interactions of the scores, its row of choices in the order of `units`."""
        return quadratic_of(self.scores, self.units)

    def _with_interactions(self, chosen: list[Choice], budget_bytes: int, linear: Solution) -> Solution:
        """From the best assignment by scores alone to one that no change of one or two units improves, if it is so much
        better that this cannot be chance."""
        everything = [choice for unit in self.units for choice in unit.choices]
        first = [0, *itertools.accumulate(len(unit.choices) for unit in self.units)]
        start = [f + unit.choices.index(c) for f, unit, c in zip(first, self.units, chosen, strict=False)]
        found = local_search(self.quadratic, start, budget_bytes - self.scores.other_bytes)
        objective, alone = (self.quadratic.value(np.array(positions)) for positions in (found, start))
        if objective > (1 - _WORTH_LEAVING) * alone:
            found, objective = start, alone
        better = _solution(self, [everything[i] for i in found], 0.0, f"{linear.solver}, local search")
        bound = min(lower_bound(self.scores, linear.bound), objective)
        return replace(better, objective=objective, bound=bound, gap=objective - bound, cut=linear.cut)


class _Search:
    """The search at one budget: `picks` are the best so far, `missing` at most what the best assignment gains more.

    `used` names the solvers that were asked.
    """

    def __init__(self, program: Program, slack_bytes: int, limits: SearchLimits) -> None:
        self._items, self._slack, self._limits = program.items, slack_bytes, limits
        self._deadline = time.monotonic() + limits.time_limit_seconds
        self._base = math.fsum(program.scale * cs[0].score for cs in program.choices)
        self._relaxed = relax(program.items, program.upgrades, slack_bytes)
        self.picks, self._bound, self.used = self._relaxed.picks, self._relaxed.bound, ""

    @property
    def missing(self) -> float:
        return self._bound - total_gain(self._items, self.picks)

    @property
    def cut(self) -> bool:
        """Whether the deadline came before the proof."""
        return self.missing > 0 and not self._good_enough() and time.monotonic() >= self._deadline

    def run(self) -> None:
        everything = [len(unit) - 1 for unit in self._items]
        if total_bytes(self._items, everything) <= self._slack:
            self.picks, self._bound, self.used = everything, total_gain(self._items, everything), "dynamic"
            return
        if self._good_enough():
            self.used = "relaxation"
            return
        self.used = "dynamic"
        if self._solved_by_states():
            return
        self.used = "dynamic, highs"
        self._improve(_FIRST_CORE)
        if self._good_enough():
            return
        self._bound = min(self._bound, self._improve(None))
        if self.missing <= _RELATIVE_RESOLUTION * math.fsum(unit[-1].gain for unit in self._items):
            self._bound = total_gain(self._items, self.picks)

    def _solved_by_states(self) -> bool:
        """Run the dynamic program; whether it proved its answer the best."""
        kept = survivors(self._relaxed, self.picks)
        better, proven = improve(self._relaxed, kept, self.picks, self._deadline, self._limits.most_states)
        self.picks = max(self.picks, better, key=lambda picks: total_gain(self._items, picks))
        if proven:
            self._bound = total_gain(self._items, self.picks)
        return proven

    def _improve(self, at_most: int | None) -> float:
        """Look for better `picks`; returns an upper bound on the gain of the choices that were left, maybe infinite."""
        core = Core.of(self._items, survivors(self._relaxed, self.picks, at_most), self._slack)
        seconds = max(self._deadline - time.monotonic(), 0.1)
        found, bound = core.run(seconds, self.picks, 0.5 * self._tolerance())
        if found is not None:
            better = fill(self._items, found, self._slack)
            self.picks = max(self.picks, better, key=lambda picks: total_gain(self._items, picks))
        return bound

    def _tolerance(self) -> float:
        return self._limits.relative_gap * abs(self._base - total_gain(self._items, self.picks))

    def _good_enough(self) -> bool:
        return self._limits.relative_gap > 0 and self.missing <= self._tolerance()


def _power_of_two_scale(choices: list[tuple[Choice, ...]]) -> float:
    """Brings the largest score to about 1 without rounding, whatever its unit."""
    largest = max((abs(c.score) for cs in choices for c in cs), default=0.0)
    return math.ldexp(1.0, min(-math.frexp(largest)[1], 1023)) if largest else 1.0


def _solution(program: Program, chosen: list[Choice], gap: float, solver: str) -> Solution:
    formats = {
        name: form
        for unit, choice in zip(program.units, chosen, strict=True)
        for name, form in zip(unit.members, choice.formats, strict=True)
    }
    objective = math.fsum(choice.score for choice in chosen)
    return Solution(
        assignment={name: formats[name] for name in program.scores.modules},
        objective=objective,
        bound=objective - gap,
        gap=gap,
        solver=solver,
        tensor_bytes=program.scores.other_bytes + sum(choice.nbytes for choice in chosen),
    )


def _infeasible(program: Program, budget_bytes: int) -> str:
    smallest, largest = program.smallest_bytes, program.largest_bytes
    fixed = program.scores.other_bytes + sum(u.choices[0].nbytes for u in program.units if len(u.choices) == 1)
    return (
        f"budget {format_bytes(budget_bytes)} is below the smallest assignment {format_bytes(smallest)}; "
        f"feasible are {smallest} to {largest} bytes "
        f"({smallest / 2**30:.2f} to {largest / 2**30:.2f} GiB), "
        f"of which {fixed} bytes are fixed (tensors with one width only). "
        f"Raise the budget to at least {smallest} bytes, or allow narrower widths or a larger group size"
    )
