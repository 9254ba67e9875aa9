"""Budgets as people write them, in bytes: `5.9GiB`, `6GB`, `123_456_789`, or an average number of bits."""

import math
import re
from fractions import Fraction

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.scores import Scores

__all__ = ["UNIT_BYTES", "average_bits_of", "budget_for_average_bits", "format_bytes", "parse_amount", "parse_budget"]

UNIT_BYTES = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

_BITS = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,10})?)\s*bits?", re.ASCII)
_BUDGET = re.compile(r"([0-9]{1,3}(?:_[0-9]{3}){0,6}|[0-9]{1,20})(\.[0-9]{1,20})?\s*([A-Za-z]*)", re.ASCII)
_ALLOWED = "allowed are whole bytes (123456789 or 123_456_789) or a number with a unit (5.9GiB, 6GB)"


def parse_budget(text: str) -> int:
    """Bytes of a budget such as `5.9GiB` (2^30), `6GB` (10^9) or `123456789`.

    Exact: the number is never a float; a fraction of a byte is dropped. Raises InputError for anything else,
    and for zero.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise InputError(f"budget {text[:40]!r} is no amount of memory; {_ALLOWED}")
    whole, fraction, unit = match[1].replace("_", ""), match[2], match[3] or None
    if unit is None and fraction is not None:
        raise InputError(f"budget {text!r} has a fraction but no unit; {_ALLOWED}")
    if unit is not None and unit not in UNIT_BYTES:
        raise InputError(
            f"budget {text!r}: unit {unit!r} is not known; allowed are {', '.join(UNIT_BYTES)} "
            "(1 GiB is 1073741824 bytes, 1 GB is 1000000000 bytes)"
        )
    nbytes = math.floor(Fraction(whole + (fraction or "")) * UNIT_BYTES[unit or "B"])
    if nbytes < 1:
        raise InputError(f"budget {text!r} is zero bytes; {_ALLOWED}")
    return nbytes


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


def parse_amount(text: str, scores: Scores) -> int:
    """Bytes of a budget given as an amount of memory (`5.9GiB`) or as average bits (`3.25bits`). Raises InputError for
    anything else, InfeasibleBudgetError for average bits that no assignment has."""
    match = _BITS.fullmatch(text.strip())
    if match is not None:
        return budget_for_average_bits(scores, float(match[1]))
    return parse_budget(text)


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


def format_bytes(nbytes: int) -> str:
    """For messages and tables: `5.90 GiB (6335076761 bytes)`, in MiB below 0.1 GiB."""
    power, unit = (30, "GiB") if nbytes >= 0.1 * 2**30 else (20, "MiB")
    return f"{nbytes / 2**power:.2f} {unit} ({nbytes} bytes)"
