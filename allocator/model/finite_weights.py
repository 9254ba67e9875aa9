"""Weights that are NaN or infinite, found while the bytes of a model are read for its digest, without torch."""

from allocator.contract.errors import ContractError
from allocator.contract.safetensors_file import StoredTensor

__all__ = ["refuse_not_finite"]

_EXPONENTS = {
    "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52),
    "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F), "F8_E8M0": ("u1", 0xFF),
}  # fmt: skip
"""By dtype the unsigned integers of its size, and the bits that are all set in NaN and infinity alone: the exponent,
and in 8-bit floats without infinity all of them."""


def refuse_not_finite(tensor: StoredTensor, chunk: bytes, offset: int) -> None:
    """Raises ContractError with tensor, row and column of the first number of `chunk` that is NaN or infinite.

    chunk: the bytes of `tensor` from byte `offset` on, whole numbers of them. Integers pass.
    """
    if tensor.dtype not in _EXPONENTS:
        return
    import numpy as np  # here, as `gamma plan` imports this package and needs none

    kind, exponent = _EXPONENTS[tensor.dtype]
    bits = np.frombuffer(chunk, kind)
    if not bits.size or int((bits & exponent).max()) != exponent:
        return
    first = int(np.flatnonzero((bits & exponent) == exponent)[0])
    mantissa = int(bits[first]) & (exponent & -exponent) - 1 or tensor.dtype in ("F8_E4M3", "F8_E8M0")
    number = offset // bits.itemsize + first
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    place = f"row {number // width}" + (f", column {number % width}" if len(tensor.shape) > 1 else "")
    raise ContractError(
        f"{tensor.path}: tensor {tensor.name} has {'NaN' if mantissa else 'infinity'} in {place}; nothing can be "
        "learned of such a model: download, convert or merge it again (a bfloat16 model converted to float16 overflows)"
    )
