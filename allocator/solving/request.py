"""From a budget as people write it to a manifest: what `gamma solve` and the sidecar both call."""

from dataclasses import dataclass

from allocator.contract.amounts import parse_average_bits, parse_budget
from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.solving.budget import budget_for_average_bits
from allocator.solving.manifest import make_manifest
from allocator.solving.program import solve
from allocator.solving.units import NO_RULES, Fusion, Rules

__all__ = ["SolveSettings", "solve_scores"]


@dataclass(frozen=True)
class SolveSettings:
    """A budget, as text (`5.9GiB`, `3.25bits`) or in average bits (exactly one of them), and what the solver must keep:
    rules for widths, and whether fused modules get one width."""

    budget: str | None = None
    average_bits: float | None = None
    rules: Rules = NO_RULES
    fusion: Fusion = "free"


def solve_scores(scores: Scores, settings: SolveSettings, time_limit_seconds: float = 60.0) -> Manifest:
    """The manifest of the best assignment for a budget. Raises InputError, InfeasibleBudgetError."""
    if (settings.budget is None) == (settings.average_bits is None):
        raise InputError("give exactly one of --budget and --average-bits")
    bits = settings.average_bits if settings.budget is None else parse_average_bits(settings.budget)
    if bits is None:
        assert settings.budget is not None
        nbytes = parse_budget(settings.budget)
        requested = f"{nbytes} bytes"  # not as typed: the manifests of 2MB and of 2000000 are one
    else:
        requested, nbytes = f"{bits} bits", budget_for_average_bits(scores, bits)
    solution = solve(
        scores,
        nbytes,
        settings.rules,
        fusion=settings.fusion,
        time_limit_seconds=time_limit_seconds,
    )
    return make_manifest(scores, solution, requested, nbytes)
