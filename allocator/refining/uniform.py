"""The best uniform plans of a budget: what an assignment must not be worse than."""

from collections.abc import Callable

from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.resident import is_in_block
from allocator.contract.scores import Scores
from allocator.solving.units import NO_RULES, Rules

__all__ = ["uniform_assignments"]


def uniform_assignments(
    scores: Scores,
    budget_bytes: int,
    rules: Rules = NO_RULES,
    used_bytes: Callable[[dict[str, ModuleFormat]], int] | None = None,
) -> list[dict[str, ModuleFormat]]:
    """The widest width that all modules can have together within `budget_bytes`, and the widest that those of the
    blocks can have with embedding and lm_head as wide as they come, which is what a uniform checkpoint usually is.

    A module that rules forbid a width gets the nearest that they allow, one without it the next narrower that it
    has. `used_bytes` says what an assignment takes of the budget; without it, all tensors of the checkpoint count.
    Empty if no width fits; one plan where both are the same.
    """
    if used_bytes is None:

        def used_bytes(assignment: dict[str, ModuleFormat]) -> int:
            return scores.other_bytes + sum(map(module_bytes, assignment.values()))

    allowed = rules.allowed(scores)
    forms = {name: sorted((c.format for c in cs), key=lambda f: f.num_bits) for name, cs in allowed.items()}
    widths = sorted({form.num_bits for of_module in forms.values() for form in of_module})
    found: list[dict[str, ModuleFormat]] = []
    for wide in (False, True):
        best = None
        for bits in widths:
            plan = {
                name: of_module[-1] if wide and not is_in_block(name) else _nearest(of_module, bits)
                for name, of_module in forms.items()
            }
            if used_bytes(plan) <= budget_bytes:
                best = plan
        if best is not None and best not in found:
            found.append(best)
    return found


def _nearest(forms: list[ModuleFormat], bits: int) -> ModuleFormat:
    return next((form for form in reversed(forms) if form.num_bits <= bits), forms[0])
