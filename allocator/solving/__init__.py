"""Stage II: the assignment of least score that fits a budget, exact to the byte. No torch."""

from allocator.solving.budget import budget_for_average_bits
from allocator.solving.manifest import make_manifest
from allocator.solving.program import Program, Solution, solve
from allocator.solving.request import SolveSettings, solve_scores
from allocator.solving.resident import solve_resident
from allocator.solving.units import Fusion, Rules

__all__ = [
    "Fusion",
    "Program",
    "Rules",
    "Solution",
    "SolveSettings",
    "budget_for_average_bits",
    "make_manifest",
    "solve",
    "solve_resident",
    "solve_scores",
]
