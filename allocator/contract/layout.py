"""Tensor names, shapes, dtypes and bytes of one module at one width: the on-disk layout in one place.

A quantized module of weight shape `[N, K]` (`[out_features, in_features]`) is stored as

    weight_packed      int32 [N, K*b/32]        dense little-endian bit stream along K, code 0 in the lowest bits
    weight_scale       16-bit float [N, K/g]
    weight_zero_point  int32 [ceil(N*b/32), K/g]  packed like the weight, along N (asymmetric only)
    weight_shape       int64 [2]                (N, K)

and dequantized as `(code - zero) * scale`, where `zero` is 2^(b-1) for symmetric modules. These are the names
and the layout of compressed-tensors >= 0.18 and of humming. A 16-bit module is a plain `weight`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "DTYPE_BYTES",
    "GROUP_SIZES",
    "PACK_UNIT",
    "WIDTHS",
    "Dtype16",
    "ModuleFormat",
    "TensorSpec",
    "module_bytes",
    "module_tensors",
    "usable_group_size",
]

WIDTHS = (2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (32, 64, 128)
PACK_UNIT = 32
"""in_features must be a multiple of this, so that a row is a whole number of 32-bit words at every width."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes of one element by the dtype's safetensors name, in the order in which that library ranks dtypes."""

Dtype16 = Literal["BF16", "F16"]
NumBits = Literal[2, 3, 4, 5, 6, 8, 16]
GroupSize = Literal[32, 64, 128]
Dim = Annotated[int, Field(ge=1, le=1 << 40)]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a safetensors header names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


class ModuleFormat(BaseModel):
    """How one module is stored: shape `[out_features, in_features]` and width; group and symmetry below 16 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[Dim, Dim]
    num_bits: NumBits
    group_size: GroupSize | None = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ModuleFormat":
        if self.num_bits == 16:
            if self.group_size is not None or self.symmetric is not None:
                raise ValueError("a 16-bit module has no group_size and no symmetric flag")
            return self
        if self.group_size is None or self.symmetric is None:
            raise ValueError(f"a {self.num_bits}-bit module needs group_size and symmetric")
        in_features = self.shape[1]
        if in_features % PACK_UNIT or in_features % self.group_size:
            raise ValueError(
                f"in_features {in_features} is no multiple of {PACK_UNIT} and of group_size {self.group_size}; "
                "such a module stays at 16 bits"
            )
        return self

    @property
    def quantized(self) -> bool:
        return self.num_bits != 16


def usable_group_size(in_features: int, requested: int) -> int | None:
    """The largest group size <= `requested` that divides `in_features`; None if the module must stay 16-bit."""
    fitting = [g for g in GROUP_SIZES if g <= requested and in_features % g == 0]
    return max(fitting) if fitting else None


def module_tensors(name: str, module: ModuleFormat, dtype: Dtype16) -> list[TensorSpec]:
    """The tensors that module `name` has in a checkpoint; `dtype` is that of 16-bit weights and of scales."""
    rows, columns = module.shape
    if not module.quantized:
        return [TensorSpec(f"{name}.weight", dtype, (rows, columns))]
    assert module.group_size is not None
    groups = columns // module.group_size
    tensors = [
        TensorSpec(f"{name}.weight_packed", "I32", (rows, columns * module.num_bits // 32)),
        TensorSpec(f"{name}.weight_scale", dtype, (rows, groups)),
        TensorSpec(f"{name}.weight_shape", "I64", (2,)),
    ]
    if not module.symmetric:
        words = -(-rows * module.num_bits // 32)
        tensors.append(TensorSpec(f"{name}.weight_zero_point", "I32", (words, groups)))
    return tensors


def module_bytes(module: ModuleFormat) -> int:
    """Bytes of all tensors of one module (`module_tensors`), exact."""
    return sum(t.nbytes for t in module_tensors("", module, "BF16"))
