"""From a budget as people write it to a manifest: what `gamma solve` and the sidecar both call."""

import math
from dataclasses import dataclass
from fractions import Fraction

from allocator.contract.amounts import parse_average_bits, parse_budget
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import Budget, Manifest, Proof
from allocator.contract.scores import Scores
from allocator.solve.program import SearchLimits, Solution, solve
from allocator.solve.units import NO_RULES, Fusion, Rules

__all__ = [
    "SolveSettings",
    "average_bits_of",
    "budget_for_average_bits",
    "make_manifest",
    "parse_amount",
    "solve_scores",
]


def budget_for_average_bits(scores: Scores, bits: float) -> int:
    """Bytes of a checkpoint whose quantizable modules have `bits` stored bits a weight on average.

    Quantizable are the modules with more than one candidate; their scales and zero points count, and all that
    is fixed comes on top. Raises InputError if `bits` is no positive number or nothing can be quantized,
    InfeasibleBudgetError if no assignment is that small.
    """
    if not (math.isfinite(bits) and bits > 0):
        raise InputError(f"average bits must be a positive number, given {bits}")
    fixed, parameters = _fixed_and_parameters(scores)
    smallest = scores.feasible_bytes()[0] - fixed
    # repr gives the decimal number that was meant: 3.1 and not the double next to it.
    allowed = math.floor(Fraction(repr(float(bits))) * parameters / 8)
    if allowed < smallest:
        raise InfeasibleBudgetError(
            f"{bits} average bits are below the smallest assignment, {8 * smallest / parameters:.4f} bits "
            "(scales and zero points included); ask for more, or allow narrower widths or a larger group size"
        )
    return fixed + allowed


def average_bits_of(scores: Scores, tensor_bytes: int) -> float:
    """Average stored bits of a checkpoint of `tensor_bytes`, counted as in `budget_for_average_bits`."""
    fixed, parameters = _fixed_and_parameters(scores)
    return 8 * (tensor_bytes - fixed) / parameters


def parse_amount(text: str, scores: Scores, what: str = "budget") -> int:
    """Bytes of a budget given as an amount of memory (`5.9GiB`) or as average bits (`3.25bits`). Raises InputError for
    anything else, InfeasibleBudgetError for average bits that no assignment has."""
    bits = parse_average_bits(text)
    return parse_budget(text, what) if bits is None else budget_for_average_bits(scores, bits)


def _fixed_and_parameters(scores: Scores) -> tuple[int, int]:
    """Bytes of all that has no choice, and the weights of the modules that have one. Raises InputError if none has."""
    fixed, parameters = scores.other_bytes, 0
    for module in scores.modules.values():
        if len(module.candidates) == 1:
            fixed += module.candidates[0].nbytes
        else:
            rows, columns = module.candidates[0].format.shape
            parameters += rows * columns
    if not parameters:
        raise InputError("the scores have one candidate a module: there is nothing to choose")
    return fixed, parameters


def make_manifest(
    scores: Scores, solution: Solution, requested: str, budget_bytes: int, resident_bytes: int | None = None
) -> Manifest:
    """The manifest of `solution`, modules in the order of `scores`; `requested` is the budget as typed.

    With `resident_bytes`, what the tightest rank holds, the budget is one of such bytes.
    """
    budget = Budget(
        requested=requested,
        nbytes=budget_bytes,
        kind=None if resident_bytes is None else "resident",
        resident_bytes=resident_bytes,
    )
    proof = Proof(
        solver=solution.solver,
        objective=solution.objective,
        bound=solution.bound,
        gap=solution.gap,
        cut=solution.cut or None,
    )
    return Manifest.of_scores(scores, solution.assignment, budget, proof)


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
    solution = solve(scores, nbytes, settings.rules, settings.fusion, SearchLimits(time_limit_seconds))
    return make_manifest(scores, solution, requested, nbytes)
