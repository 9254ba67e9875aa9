"""Stage II: the assignment of least score that fits a budget, exact to the byte. No torch."""

from allocator.solve.per_rank import solve_resident
from allocator.solve.program import Program, SearchLimits, Solution, solve
from allocator.solve.request import SolveSettings, budget_for_average_bits, make_manifest, solve_scores
from allocator.solve.units import Fusion, Rules

__all__ = [
    "Fusion",
    "Program",
    "Rules",
    "SearchLimits",
    "Solution",
    "SolveSettings",
    "budget_for_average_bits",
    "make_manifest",
    "solve",
    "solve_resident",
    "solve_scores",
]
