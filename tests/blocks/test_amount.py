"""How much text a model is calibrated on where nobody says it: large models 128 x 2048, small ones what they need."""

import pytest

from allocator.blocks.calibration import calibration_amount


@pytest.mark.parametrize("parameters", [68_000_000, 1_100_000_000, 8_000_000_000, 32_000_000_000])
def test_from_67_million_parameters_on_it_is_128_sequences_of_2048(parameters: int) -> None:
    assert calibration_amount(parameters, 40_960) == (128, 2048)
    assert calibration_amount(parameters, 512) == (128, 512)
    assert calibration_amount(parameters, None) == (128, 2048)


def test_small_models_get_less_in_many_short_sequences() -> None:
    assert calibration_amount(35_000, 4096) == (32, 256)
    assert calibration_amount(35_000, 128) == (64, 128)
    sequences, length = calibration_amount(7_300_000, 1024)
    assert sequences >= 32
    assert 65_536 <= sequences * length <= 131_072


def test_a_larger_model_never_gets_less() -> None:
    amounts = [calibration_amount(2**power, 32_768) for power in range(10, 40)]
    tokens = [sequences * length for sequences, length in amounts]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 128 * 2048


def test_what_is_given_is_obeyed() -> None:
    assert calibration_amount(35_000, 4096, 128, 2048) == (128, 2048)
    assert calibration_amount(35_000, 4096, 8) == (8, 2048)
    assert calibration_amount(35_000, 4096, None, 64) == (128, 64)
    assert calibration_amount(35_000, 512, 8, 2048) == (8, 512)  # the model has no more
    assert calibration_amount(35_000, None, 8, 4096) == (8, 4096)
