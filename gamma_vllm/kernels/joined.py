"""A layer of several segments as one operator takes it: all tensors in one list, and numbers that tell them apart."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gamma_vllm.shards import Segment

if TYPE_CHECKING:
    from gamma_vllm.kernels.choose import Kernel

__all__ = ["check_columns", "kinds_of", "split_kinds", "tensors_of"]


def check_columns(segments: Sequence[Segment], x: Tensor) -> None:
    """Raises ValueError when the activations `[..., columns]` are of another layer: operators read bare memory."""
    columns = segments[0].columns
    if x.shape[-1] != columns:
        raise ValueError(f"{x.shape[-1]} activations for a weight of {columns} columns")


def tensors_of(kernel: "Kernel", segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Of each segment `weight` at 16 bits, else what `kernel.tensor_names` names."""
    return [
        held[name]
        for segment, held in zip(segments, tensors, strict=True)
        for name in (kernel.tensor_names(segment) if segment.quantized else ("weight",))
    ]


def kinds_of(segments: Sequence[Segment]) -> list[int]:
    """Of each segment rows, group size (0 at 16 bits), bits, and 1 if symmetric."""
    return [n for s in segments for n in (s.rows, s.group_size or 0, s.num_bits, int(bool(s.symmetric)))]


def split_kinds(kinds: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """The numbers of `kinds_of`, segment by segment."""
    return zip(*[iter(kinds)] * 4, strict=True)
