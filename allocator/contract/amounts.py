"""Amounts of memory as people write them, in bytes: `5.9GiB`, `6GB`, `123_456_789`."""

import math
import re
from fractions import Fraction

from allocator.contract.errors import InputError

__all__ = ["UNIT_BYTES", "format_bytes", "parse_average_bits", "parse_budget"]

UNIT_BYTES = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

_BUDGET = re.compile(r"([0-9]{1,3}(?:_[0-9]{3}){0,6}|[0-9]{1,20})(\.[0-9]{1,20})?\s*([A-Za-z]*)", re.ASCII)
_AVERAGE_BITS = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,10})?)\s*bits?", re.ASCII)
_ALLOWED = "allowed are whole bytes (123456789 or 123_456_789) or a number with a unit (5.9GiB, 6GB)"


def parse_budget(text: str, what: str = "budget") -> int:
    """Bytes of a budget such as `5.9GiB` (2^30), `6GB` (10^9) or `123456789`.

    Exact: the number is never a float; a fraction of a byte is dropped. Raises InputError for anything else,
    and for zero; it names the amount as `what`.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{what} {text[:40]!r} is no amount of memory; {_ALLOWED}")
    whole, fraction, unit = match[1].replace("_", ""), match[2], match[3] or None
    if unit is None and fraction is not None:
        raise InputError(f"{what} {text!r} has a fraction but no unit; {_ALLOWED}")
    if unit is not None and unit not in UNIT_BYTES:
        raise InputError(
            f"{what} {text!r}: unit {unit!r} is not known; allowed are {', '.join(UNIT_BYTES)} "
            "(1 GiB is 1073741824 bytes, 1 GB is 1000000000 bytes)"
        )
    nbytes = math.floor(Fraction(whole + (fraction or "")) * UNIT_BYTES[unit or "B"])
    if nbytes < 1:
        raise InputError(f"{what} {text!r} is zero bytes; {_ALLOWED}")
    return nbytes


def parse_average_bits(text: str) -> float | None:
    """The average width in a budget such as `3.25bits`, None for one of another kind."""
    match = _AVERAGE_BITS.fullmatch(text.strip())
    return None if match is None else float(match[1])


def format_bytes(nbytes: int) -> str:
    """For messages and tables: `5.90 GiB (6335076761 bytes)`, in MiB below 0.1 GiB."""
    power, unit = (30, "GiB") if nbytes >= 0.1 * 2**30 else (20, "MiB")
    return f"{nbytes / 2**power:.2f} {unit} ({nbytes} bytes)"
