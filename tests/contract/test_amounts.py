"""An amount of memory means exactly the bytes that were written down, or is refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.contract.amounts import UNIT_BYTES, parse_budget
from allocator.contract.errors import InputError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("123456789", 123456789),
        ("123_456_789", 123456789),
        ("1", 1),
        ("6GB", 6_000_000_000),
        ("6 GB", 6_000_000_000),
        ("6GiB", 6 * 2**30),
        ("5.9GiB", 6335076761),
        ("5.9GB", 5_900_000_000),
        ("0.1TiB", 109951162777),
        (" 512 MiB ", 512 * 2**20),
        ("1.5kB", 1500),
        ("100B", 100),
        ("9.007199254740993TB", 9007199254740),
    ],
)
def test_budget_is_read_to_the_byte(text, nbytes):
    assert parse_budget(text) == nbytes


@given(st.integers(1, 10**15))
def test_whole_bytes_come_back(nbytes):
    assert parse_budget(str(nbytes)) == parse_budget(f"{nbytes:_}") == parse_budget(f"{nbytes}B") == nbytes


@given(st.integers(1, 10**6), st.integers(0, 999), st.sampled_from(sorted(UNIT_BYTES)))
def test_decimal_fractions_of_a_unit_are_exact(whole, thousandths, unit):
    expected = int(Fraction(1000 * whole + thousandths, 1000) * UNIT_BYTES[unit])
    assert parse_budget(f"{whole}.{thousandths:03d}{unit}") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5.9GIB", "unit 'GIB' is not known; allowed are B, .*1 GiB is 1073741824 bytes"),
        ("6Gb", "unit 'Gb' is not known"),
        ("6G", "unit 'G' is not known"),
        ("5.9", "has a fraction but no unit"),
        ("-1GiB", "no amount of memory"),
        ("nan", "no amount of memory"),
        ("infGiB", "no amount of memory"),
        ("1e9", "no amount of memory"),
        ("1_0", "no amount of memory"),
        ("1,5GiB", "no amount of memory"),
        ("0x10", "no amount of memory"),
        ("", "no amount of memory"),
        ("GiB", "no amount of memory"),
        ("٣GiB", "no amount of memory"),
        ("9" * 5000, "no amount of memory"),
        ("0", "is zero bytes"),
        ("0.1B", "is zero bytes"),
    ],
)
def test_anything_else_is_refused_and_says_what_is_allowed(text, message):
    with pytest.raises(InputError, match=message) as refusal:
        parse_budget(text)
    assert "allowed are" in str(refusal.value)
    assert len(str(refusal.value)) < 400


@given(st.text(max_size=12))
def test_random_text_is_a_budget_or_refused(text):
    try:
        assert parse_budget(text) > 0
    except InputError as error:
        assert "budget" in str(error)  # noqa: PT017
