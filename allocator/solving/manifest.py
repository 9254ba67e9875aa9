"""A solution as a manifest: bytes counted anew, and bound to the scores and the bank by their digests."""

from allocator.contract.layout import module_bytes
from allocator.contract.manifest import Budget, Manifest, Proof
from allocator.contract.scores import Scores
from allocator.solving.program import Solution

__all__ = ["make_manifest"]


def make_manifest(
    scores: Scores, solution: Solution, requested: str, budget_bytes: int, resident_bytes: int | None = None
) -> Manifest:
    """The manifest of `solution`, modules in the order of `scores`; `requested` is the budget as typed.

    With `resident_bytes`, what the tightest rank holds, the budget is one of such bytes.
    """
    sizes = {name: module_bytes(solution.assignment[name]) for name in scores.modules}
    return Manifest(
        model=scores.model,
        bank_digest=scores.bank_digest,
        scores_digest=scores.digest,
        method=scores.method,
        dtype=scores.dtype,
        channel_blocks=scores.channel_blocks,
        budget=Budget(
            requested=requested,
            nbytes=budget_bytes,
            kind=None if resident_bytes is None else "resident",
            resident_bytes=resident_bytes,
        ),
        tensor_bytes=scores.other_bytes + sum(sizes.values()),
        other_bytes=scores.other_bytes,
        module_bytes=sizes,
        modules={name: solution.assignment[name] for name in scores.modules},
        proof=Proof(
            solver=solution.solver,
            objective=solution.objective,
            bound=solution.bound,
            gap=solution.gap,
            cut=solution.cut or None,
        ),
    )
