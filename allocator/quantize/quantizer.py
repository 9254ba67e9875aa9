"""What a quantizer is given and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import dequantize, pack_codes, pack_zero_points, unpack_codes, unpack_zero_points

__all__ = ["InputStatistics", "QuantizedModule", "Quantizer", "Statistics", "row_segments", "row_stripes"]

_STRIPE_WEIGHTS = 1 << 26
_SEGMENT_ROWS = 4096

Statistics = Literal["none", "diagonal", "hessian", "kronecker"]
"""What a quantizer needs to know of a module's inputs x: nothing, the sum of x^2, or the sum of x x^T; kronecker: the
sum of |g|^2 x x^T, g being the gradients at the module's outputs, and the mean of |x|^2 g g^T."""


@dataclass
class InputStatistics:
    """Second moment of a module's inputs on calibration text, sums over `tokens` tokens.

    hessian: sum of x x^T, float32 `[K, K]`, None where only its `diagonal` `[K]` was asked for. Modules that share
    an input share the object, and `derived` keeps what a quantizer computed from it: the first of them may use up
    the Hessian's memory for that (see `allocator.quantize.ldl`).

    output_moments: mean of |x|^2 g g^T over tokens and probes, g being the gradients at the module's outputs, float32
    `[n, n]` for each of its `row_segments`, of any scale; none where they were not asked for, or no gradients came.
    """

    hessian: Tensor | None
    tokens: int
    diagonal: Tensor = field(default_factory=lambda: torch.empty(0))
    derived: dict[str, object] = field(default_factory=dict)
    output_moments: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if self.hessian is not None and not self.diagonal.numel():
            self.diagonal = torch.diagonal(self.hessian).clone()

    def of_segment(self, number: int) -> "InputStatistics":
        """Those of one of the module's `row_segments`."""
        return replace(self, output_moments=[self.output_moments[number]])

    @property
    def moments(self) -> Tensor:
        """Mean square of each input feature, float32 `[K]`."""
        return self.diagonal / max(self.tokens, 1)


def row_segments(rows: int, columns: int) -> list[slice]:
    """Rows whose outputs are taken to have to do with each other: all of most modules."""
    return row_stripes(rows, max(columns, _STRIPE_WEIGHTS // _SEGMENT_ROWS))


def row_stripes(rows: int, columns: int) -> list[slice]:
    """Rows that are quantized together, so that the working memory of a large module stays small (64 M weights).

    All stripes but the last have a multiple of 32 rows: their packed zero points, in whole words, can be joined.
    """
    size = max(32, _STRIPE_WEIGHTS // columns // 32 * 32)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@dataclass(frozen=True)
class QuantizedModule:
    """codes: uint8 `[N, K]`; scale: 16-bit float `[N, K/g]`; zero_point: uint8 `[N, K/g]`, None when symmetric."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def joined(cls, stripes: "Sequence[QuantizedModule]") -> "QuantizedModule":
        """One module of the rows of several."""
        if len(stripes) == 1:
            return stripes[0]
        zeros = [s.zero_point for s in stripes if s.zero_point is not None]
        return cls(
            torch.cat([s.codes for s in stripes]),
            torch.cat([s.scale for s in stripes]),
            torch.cat(zeros) if zeros else None,
        )

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], num_bits: int) -> "QuantizedModule":
        """The module whose `packed` tensors these are."""
        codes = unpack_codes(tensors["weight_packed"], num_bits)
        zeros = tensors.get("weight_zero_point")
        zero_point = None if zeros is None else unpack_zero_points(zeros, num_bits, codes.shape[0])
        return cls(codes, tensors["weight_scale"], zero_point)

    def packed(self, num_bits: int) -> dict[str, Tensor]:
        """The tensors of `allocator.contract.layout`, keyed by their last name part."""
        tensors = {
            "weight_packed": pack_codes(self.codes, num_bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.zero_point is not None:
            tensors["weight_zero_point"] = pack_zero_points(self.zero_point, num_bits)
        return tensors

    def dequantized(self, num_bits: int) -> Tensor:
        """Float32 weight `[N, K]`, exactly as a server computes it from the packed tensors."""
        tensors = self.packed(num_bits)
        return dequantize(tensors["weight_packed"], self.scale, tensors.get("weight_zero_point"), num_bits)


class Quantizer(Protocol):
    """Turns one weight into one candidate. Third parties register theirs under the entry point `gamma.quantizers`."""

    name: str
    statistics: Statistics

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        """Quantize float32 `weight` `[N, K]` to `module` (below 16 bits); scales are stored in `dtype`."""
        ...
