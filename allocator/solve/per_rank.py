"""Solving for bytes that a rank of vLLM holds after loading, instead of bytes of the checkpoint.

Each pipeline stage is a program of its own: its modules, and the budget of its ranks. Modules count as if each were
packed for itself; packing neighbours together only saves, so that the budget always holds, and what it saves is given
to the modules in another round.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from allocator.contract.errors import InfeasibleBudgetError
from allocator.contract.layout import ModuleFormat
from allocator.contract.manifest import Manifest
from allocator.contract.resident import Residency
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.solve.program import SearchLimits, Solution, solve
from allocator.solve.quadratic import interactions_among
from allocator.solve.request import SolveSettings, make_manifest
from allocator.solve.units import Rules

__all__ = ["resident_scores", "solve_resident"]

_MOST_CORRECTIONS = 8
_UNUSED_PART = 1000
"""What is left of a budget is not worth another search below this part of it."""


def solve_resident(
    scores: Scores,
    settings: SolveSettings,
    residency: Residency,
    budget_bytes: int,
    requested: str,
    time_limit_seconds: float = 60.0,
) -> Manifest:
    """The assignment of least total score whose weights take at most `budget_bytes` on the tightest rank.

    `settings` give rules and fusion; their budget does not count. `requested` names the budget
    for people. Raises InfeasibleBudgetError, InputError for rules that cannot be kept or for scores of another model.
    """
    scores.parents.check_ranks(residency.tensor_parallel_size)
    allowed, best = budget_bytes, None
    for _ in range(_MOST_CORRECTIONS):
        try:
            solution = _solve_stages(scores, settings, residency, allowed, time_limit_seconds)
        except InfeasibleBudgetError:
            if best is None and allowed == budget_bytes:
                raise
            break
        resident = max(residency.stage_bytes(solution.assignment))
        if resident <= budget_bytes and (best is None or solution.objective < best[0].objective):
            best = solution, resident
        # Packed together, neighbours leave room; experts dealt out whole can make one rank larger than its share.
        spare = budget_bytes - resident
        if 0 <= spare <= budget_bytes // _UNUSED_PART or (spare < 0 and best is not None):
            break
        allowed += spare
    if best is None:
        raise InfeasibleBudgetError(
            f"no assignment was found with at most {budget_bytes} bytes on every rank; experts of different widths do "
            "not divide evenly among the ranks: serve without expert parallelism, or raise the budget"
        )
    return make_manifest(scores, best[0], requested, budget_bytes, best[1])


def resident_scores(scores: Scores, residency: Residency, stage: int) -> Scores:
    """`scores` of the modules of one stage with the bytes that they take on a rank, which are no longer those of files.

    A tied embedding that two stages hold belongs to the first; the last reserves it at 16 bits. Of the interactions
    those between modules of the stage stay.
    """
    other_bytes = residency.stages[stage].other_bytes
    modules = {}
    for name, module in scores.modules.items():
        held = residency.stages_of(name)
        if held[0] == stage:
            modules[name] = _resident(name, module, residency)
        elif stage in held:
            shape = module.candidates[0].format.shape
            other_bytes += residency.module_bytes(name, ModuleFormat(shape=shape, num_bits=16))
    together = interactions_among(scores, modules)
    return scores.model_copy(update={"modules": modules, "other_bytes": other_bytes, "interactions": together})


def _resident(name: str, module: ScoredModule, residency: Residency) -> ScoredModule:
    counted = []
    for candidate in module.candidates:
        nbytes = residency.module_bytes(name, candidate.format)
        # Not validated: the bytes of a candidate are those of its file everywhere else.
        counted.append(Candidate.model_construct(format=candidate.format, nbytes=nbytes, score=candidate.score))
    return module.model_copy(update={"candidates": counted})


def _solve_stages(
    scores: Scores, settings: SolveSettings, residency: Residency, budget_bytes: int, seconds: float
) -> Solution:
    stages = range(len(residency.stages))
    limits = SearchLimits(seconds / len(stages))
    parts = []
    for stage in stages:
        view = resident_scores(scores, residency, stage)
        try:
            rules = _rules_for(settings.rules, view, scores)
            parts.append(solve(view, budget_bytes, rules, settings.fusion, limits))
        except InfeasibleBudgetError as error:
            where = f"pipeline stage {stage}: " if len(stages) > 1 else ""
            raise InfeasibleBudgetError(f"{where}on each rank, {error}") from None
    if len(parts) == 1:
        return parts[0]
    assignment = {name: form for part in parts for name, form in part.assignment.items()}
    return replace(
        parts[0],
        assignment={name: assignment[name] for name in scores.modules},
        objective=math.fsum(part.objective for part in parts),
        bound=math.fsum(part.bound for part in parts),
        gap=math.fsum(part.gap for part in parts),
        solver=", ".join(dict.fromkeys(part.solver for part in parts)),
        tensor_bytes=sum(part.tensor_bytes for part in parts),
        cut=any(part.cut for part in parts),
    )


def _rules_for(rules: Rules, view: Scores, scores: Scores) -> Rules:
    """The rules that a stage's modules know; one that matches no module at all stays, so that it is refused."""

    def known(of_kind: Mapping[str, int]) -> dict[str, int]:
        return {p: b for p, b in of_kind.items() if matches(p, view) or not matches(p, scores)}

    def matches(pattern: str, of: Scores) -> bool:
        return any(fnmatchcase(name, pattern) for name in of.modules)

    return Rules(known(rules.pins), known(rules.ceilings), known(rules.floors))
