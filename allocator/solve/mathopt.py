"""What the reductions leave of the program, given to an integer solver: HiGHS, which OR-Tools has."""

import ctypes
import datetime
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from allocator.solve.linear_relaxation import Item, Picks, total_bytes, total_gain

__all__ = [
    "Core",
    "stdout_to_stderr",
]

_LOCK = threading.Lock()


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send file descriptor 1 to 2 meanwhile: HiGHS prints debugging lines even when told to be quiet."""
    with _LOCK:
        _flush_c_streams()
        try:
            saved = os.dup(1)
        except OSError:  # stdout is closed: nothing to keep clean
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            _flush_c_streams()
            os.dup2(saved, 1)
            os.close(saved)


def _flush_c_streams() -> None:
    ctypes.CDLL(None).fflush(None)


_LARGEST_GAIN = 2.0**13
"""Largest objective coefficient given to the solver, whose tolerances are absolute (1e-6)."""


@dataclass(frozen=True)
class Core:
    """What is left of the program for the integer solver: units with more than one surviving choice."""

    items: list[list[Item]]
    kept: list[list[int]]
    slack_bytes: int
    open_units: list[int]
    divisor: int

    @classmethod
    def of(cls, items: list[list[Item]], kept: list[list[int]], slack_bytes: int) -> "Core":
        open_units = [u for u, js in enumerate(kept) if len(js) > 1]
        steps = [items[u][j].nbytes - items[u][kept[u][0]].nbytes for u in open_units for j in kept[u]]
        floor = [js[0] for js in kept]
        return cls(items, kept, slack_bytes - total_bytes(items, floor), open_units, math.gcd(*steps) or 1)

    def run(self, seconds: float, start: Picks, tolerance: float = 0.0) -> tuple[Picks | None, float]:
        """Picks within the budget (None if the solver has none) and an upper bound on the total gain, maybe infinite.

        The search ends when the two differ by at most `tolerance`.
        """
        floor = [js[0] for js in self.kept]
        if not self.open_units:
            return floor, total_gain(self.items, floor)
        from ortools.math_opt.python import mathopt  # here: loading it takes longer than most answers

        scale = self._objective_scale()
        model = mathopt.Model(name="gamma")
        variables: dict[tuple[int, int], Any] = {}
        bytes_used, gain, hint = [], [], mathopt.SolutionHint()
        for u in self.open_units:
            base, *better = self.kept[u]
            for j in better:
                x = variables[u, j] = model.add_binary_variable()
                step = self.items[u][j].nbytes - self.items[u][base].nbytes
                bytes_used.append(step // self.divisor * x)
                gain.append(scale * (self.items[u][j].gain - self.items[u][base].gain) * x)
                hint.variable_values[x] = float(start[u] == j)
            model.add_linear_constraint(mathopt.fast_sum([variables[u, j] for j in better]) <= 1)
        model.add_linear_constraint(mathopt.fast_sum(bytes_used) <= self.slack_bytes // self.divisor)
        model.maximize(mathopt.fast_sum(gain))
        with stdout_to_stderr():
            result = mathopt.solve(
                model,
                mathopt.SolverType.HIGHS,
                params=_parameters(seconds, tolerance * scale),
                model_params=mathopt.ModelSolveParameters(solution_hints=[hint]),
            )
        if not result.has_primal_feasible_solution():
            return None, math.inf
        bound = total_gain(self.items, floor) + result.termination.objective_bounds.dual_bound / scale
        values = result.variable_values()
        picks = list(floor)
        for (u, j), x in variables.items():
            if values[x] > 0.5:
                picks[u] = j
        fits = total_bytes(self.items, picks) - total_bytes(self.items, floor) <= self.slack_bytes
        return (picks if fits else None), bound

    def _objective_scale(self) -> float:
        gains = [self.items[u][self.kept[u][-1]].gain - self.items[u][self.kept[u][0]].gain for u in self.open_units]
        return 2.0 ** math.floor(math.log2(min(_LARGEST_GAIN / max(gains), 2.0**900)))


def _parameters(seconds: float, tolerance: float) -> Any:
    from ortools.math_opt.python import mathopt

    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=seconds),
        absolute_gap_tolerance=tolerance,
        relative_gap_tolerance=0.0,
        random_seed=0,
    )
    parameters.highs.string_options["parallel"] = "off"
    for name in ("mip_feasibility_tolerance", "primal_feasibility_tolerance", "dual_feasibility_tolerance"):
        parameters.highs.double_options[name] = 1e-9
    return parameters
