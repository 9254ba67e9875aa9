"""Budgets as an average number of bits, `3.25bits`, in bytes of a given model."""

import math
from fractions import Fraction

from allocator.contract.amounts import parse_average_bits, parse_budget
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.scores import Scores

__all__ = ["average_bits_of", "budget_for_average_bits", "parse_amount"]


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
