"""The best uniform plan of a budget: what an assignment must not be worse than."""

from collections.abc import Callable, Mapping

from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.scores import Scores
from allocator.solving.units import Rules

__all__ = ["uniform_assignment"]


def uniform_assignment(
    scores: Scores,
    budget_bytes: int,
    pins: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
    used_bytes: Callable[[dict[str, ModuleFormat]], int] | None = None,
) -> dict[str, ModuleFormat] | None:
    """The widest width that all modules can have together within `budget_bytes`.

    `used_bytes` says what an assignment takes of the budget; without it, all tensors of the checkpoint count.
    A module that rules forbid that width gets the nearest that they allow, one without it the next narrower that it
    has. None if no width fits.
    """
    allowed = Rules(pins or {}, ceilings or {}, floors or {}).allowed(scores)
    if used_bytes is None:

        def used_bytes(assignment: dict[str, ModuleFormat]) -> int:
            return scores.other_bytes + sum(map(module_bytes, assignment.values()))

    best: dict[str, ModuleFormat] | None = None
    for bits in sorted({c.format.num_bits for module in scores.modules.values() for c in module.candidates}):
        plan = {}
        for name, candidates in allowed.items():
            forms = sorted((c.format for c in candidates), key=lambda f: f.num_bits)
            plan[name] = next((f for f in reversed(forms) if f.num_bits <= bits), forms[0])
        if used_bytes(plan) <= budget_bytes:
            best = plan
    return best
