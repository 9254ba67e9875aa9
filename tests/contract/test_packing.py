"""The layout on disk: what is packed comes back, and the bit stream is the one the format promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.contract.layout import GROUP_SIZES, WIDTHS, ModuleFormat, module_bytes, module_tensors
from allocator.contract.packing import (
    dequantize,
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)

QUANTIZED_WIDTHS = [b for b in WIDTHS if b != 16]
widths = st.sampled_from(QUANTIZED_WIDTHS)
seeds = st.integers(0, 2**32 - 1)


def random_codes(shape: tuple[int, ...], num_bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << num_bits, shape, generator=generator, dtype=torch.uint8)


def bit_stream(words: list[int], num_bits: int, count: int) -> list[int]:
    """The codes of a dense little-endian bit stream, one Python integer for the whole row."""
    row = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(row >> (i * num_bits)) & ((1 << num_bits) - 1) for i in range(count)]


@settings(deadline=None, max_examples=60)
@given(widths, st.integers(1, 7), st.integers(1, 5), seeds)
def test_codes_come_back_and_lie_in_a_dense_little_endian_stream(num_bits, rows, units, seed):
    codes = random_codes((rows, 32 * units), num_bits, seed)
    packed = pack_codes(codes, num_bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, units * num_bits)
    assert torch.equal(unpack_codes(packed, num_bits), codes)
    assert bit_stream(packed[-1].tolist(), num_bits, 32 * units) == codes[-1].tolist()


@pytest.mark.parametrize("num_bits", QUANTIZED_WIDTHS)
def test_largest_codes_survive_the_sign_bit_of_int32(num_bits):
    codes = torch.full((2, 64), (1 << num_bits) - 1, dtype=torch.uint8)
    packed = pack_codes(codes, num_bits)
    assert packed.eq(-1).all()
    assert torch.equal(unpack_codes(packed, num_bits), codes)


@settings(deadline=None, max_examples=60)
@given(widths, st.integers(1, 70), st.integers(1, 4), seeds)
def test_zero_points_come_back_for_every_number_of_rows(num_bits, rows, groups, seed):
    zero_points = random_codes((rows, groups), num_bits, seed)
    packed = pack_zero_points(zero_points, num_bits)
    assert packed.shape == (math.ceil(rows * num_bits / 32), groups)
    assert torch.equal(unpack_zero_points(packed, num_bits, rows), zero_points)
    assert bit_stream(packed[:, 0].tolist(), num_bits, rows) == zero_points[:, 0].tolist()


@settings(deadline=None, max_examples=40)
@given(widths, st.sampled_from(GROUP_SIZES), st.booleans(), st.integers(1, 40), st.integers(1, 2), seeds)
def test_dequantize_equals_the_formula_element_by_element(num_bits, group, symmetric, rows, groups, seed):
    columns = group * groups
    codes = random_codes((rows, columns), num_bits, seed)
    zeros = random_codes((rows, groups), num_bits, seed + 1)
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    packed_zeros = None if symmetric else pack_zero_points(zeros, num_bits)
    weight = dequantize(pack_codes(codes, num_bits), scale, packed_zeros, num_bits)
    assert weight.dtype == torch.float32
    for n in {0, rows - 1}:
        for k in range(columns):
            zero = 1 << (num_bits - 1) if symmetric else int(zeros[n, k // group])
            expected = (int(codes[n, k]) - zero) * float(scale[n, k // group])
            assert weight[n, k].item() == torch.tensor(expected, dtype=torch.float32).item()


@settings(deadline=None, max_examples=60)
@given(widths, st.sampled_from(GROUP_SIZES), st.booleans(), st.integers(1, 70), st.integers(1, 3))
def test_packed_tensors_have_the_shapes_and_bytes_of_the_formula(num_bits, group, symmetric, rows, groups):
    form = ModuleFormat(shape=(rows, group * groups), num_bits=num_bits, group_size=group, symmetric=symmetric)
    codes = torch.zeros(rows, group * groups, dtype=torch.uint8)
    real = {
        "m.weight_packed": pack_codes(codes, num_bits),
        "m.weight_scale": torch.zeros(rows, groups, dtype=torch.bfloat16),
        "m.weight_shape": torch.tensor([rows, group * groups]),
    }
    if not symmetric:
        real["m.weight_zero_point"] = pack_zero_points(torch.zeros(rows, groups, dtype=torch.uint8), num_bits)
    declared = {t.name: t.shape for t in module_tensors("m", form, "BF16")}
    assert declared == {name: tuple(t.shape) for name, t in real.items()}
    assert module_bytes(form) == sum(t.nbytes for t in real.values())


def test_a_row_that_is_no_whole_number_of_words_is_refused():
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        pack_codes(torch.zeros(1, 48, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"in_features 48 .* stays at 16 bits"):
        ModuleFormat(shape=(8, 48), num_bits=4, group_size=32, symmetric=True)
