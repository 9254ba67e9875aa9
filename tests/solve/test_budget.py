"""Average bits count what can be chosen and nothing else, or are refused."""

import pytest

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import average_bits
from allocator.solve import budget_for_average_bits, solve


def test_average_bits_count_scales_and_leave_out_what_is_fixed(make_scores):
    widths = {2: 4.0, 3: 2.0, 4: 1.0, 8: 0.0}
    modules = {f"m{i}": ((64, 128), widths) for i in range(20)} | {"lm_head": ((64, 128), {16: 0.0})}
    scores = make_scores(modules, 77)
    budget = budget_for_average_bits(scores, 4.0)
    assert budget == 77 + 64 * 128 * 2 + 20 * 64 * 128 * 4 // 8
    solution = solve(scores, budget)
    chosen = {name for name in modules if name != "lm_head"}
    assert 3.5 < average_bits(solution.assignment, chosen) <= 4.0
    assert budget_for_average_bits(scores, 3.1) == 77 + 64 * 128 * 2 + 31 * 20 * 64 * 128 // 80


def test_average_bits_out_of_reach_are_refused(make_scores):
    scores = make_scores({"m": ((64, 128), {2: 1.0, 4: 0.0})})
    with pytest.raises(InfeasibleBudgetError, match=r"2\.0 average bits are below the smallest assignment, 2\.5156"):
        budget_for_average_bits(scores, 2.0)
    for bits in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be a positive number"):
            budget_for_average_bits(scores, bits)
    with pytest.raises(InputError, match="nothing to choose"):
        budget_for_average_bits(make_scores({"m": ((64, 128), {16: 0.0})}), 4.0)
