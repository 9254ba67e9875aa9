"""A layer of several segments, one product after the other: what kernels without a joined call do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gamma_vllm.shards import Segment

if TYPE_CHECKING:
    from gamma_vllm.kernels.choose import Kernel

__all__ = ["multiply_in_turn"]


def multiply_in_turn(
    kernel: "Kernel", segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor
) -> Tensor:
    """`x` `[..., columns]` times each segment, joined: `[..., sum of rows]`; see `Kernel.layer`."""
    outputs = [
        kernel.linear(segment, held, x) if segment.quantized else F.linear(x, held["weight"])
        for segment, held in zip(segments, tensors, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
