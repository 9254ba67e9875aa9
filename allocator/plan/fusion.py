"""Free widths inside a fused layer (q/k/v, gate/up), or one: which is taken where nothing is said, and its price."""

from collections.abc import Callable
from typing import Literal

from allocator.contract.manifest import Manifest
from allocator.contract.scores import Fusion
from allocator.plan.schema import Plan

__all__ = ["AskedFusion", "fusion_for", "fusion_price"]

AskedFusion = Literal["auto", "free", "tied"]

FREE_DECODE_PART = 0.14
"""Of decode, at one sequence and 8B shapes on an H100 (benchmarks/results/serving_cuda.json): a launch a width."""


def fusion_for(asked: AskedFusion, plan: Plan | None) -> Fusion:
    """What `auto` means: one width where the plan is of CUDA (humming multiplies), free widths elsewhere."""
    if asked != "auto":
        return asked
    return "tied" if plan is not None and plan.request.kernel == "humming" else "free"


def fusion_price(tied: Manifest, solve_free: Callable[[], Manifest]) -> str:
    """What one width a fused layer costs at the budget of `tied`, and what free widths would, as a sentence. Empty
    for a manifest that nobody solved."""
    if tied.proof is None:
        return ""
    free = solve_free().proof
    assert free is not None
    part = tied.proof.objective / free.objective - 1 if free.objective else 0.0
    return (
        f"one width a fused layer costs {max(part, 0.0):.1%} of predicted loss at this budget; free widths "
        f"(--fusion free) cost some {FREE_DECODE_PART:.0%} of decode on CUDA"
    )
