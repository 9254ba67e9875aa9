"""How much calibration text a model is given where nobody says it."""

from math import isqrt

__all__ = ["FULL_FROM_PARAMETERS", "calibration_amount"]

_SEQUENCES, _LENGTH = 128, 2048
_LEAST_TOKENS, _TOKENS_A_ROOT = 8192, 16
_FEW_SEQUENCES, _SHORT = 32, 256

FULL_FROM_PARAMETERS = (_SEQUENCES * _LENGTH // _TOKENS_A_ROOT) ** 2
"""Models of so many have all sequences at their full length."""


def calibration_amount(
    parameters: int, longest: int | None, sequences: int | None = None, length: int | None = None
) -> tuple[int, int]:
    """Number and length of the calibration sequences for a model of so many `parameters` and `longest` positions.

    Where neither is given: 16 tokens for each unit of the root of the parameters, at least 8,192 and at most 128
    sequences of 2048, which every model from 0.27 billion parameters on has. The root follows the width of a model, and
    the second moments of an input need so many tokens a feature. Fewer tokens come as 32 sequences of at least 256, so
    that they are of as many places. `docs/scale.md` has what that costs. A number that is given is kept, with 128 or
    2048 beside it; only a length that the model does not have is cut.
    """
    longest = longest or max(_LENGTH, length or 0)
    if sequences is not None or length is not None:
        return sequences or _SEQUENCES, min(length or _LENGTH, longest)
    tokens = min(_SEQUENCES * _LENGTH, max(_LEAST_TOKENS, _TOKENS_A_ROOT * isqrt(parameters)))
    length = min(_LENGTH, longest, max(_SHORT, tokens // _FEW_SEQUENCES))
    return min(_SEQUENCES, -(-tokens // length)), length
