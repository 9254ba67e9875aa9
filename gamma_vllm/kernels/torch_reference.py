"""The judge: unpack, dequantize in float32, multiply. Correct on every device, for every width; not fast."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.contract.packing import dequantize
from gamma_vllm.kernels.base import OneByOne, define, multiply_in_turn
from gamma_vllm.shards import Segment

__all__ = ["BLOCK_ELEMENTS", "TorchKernel"]

BLOCK_ELEMENTS = 1 << 22
"""Weights dequantized at a time: unpacking takes about 16 bytes for each, and nothing of it is kept."""


@dataclass(frozen=True)
class TorchKernel(OneByOne):
    """Multiplies with the checkpoint's own tensors; see `gamma_vllm.kernels.base.Kernel`."""

    name = "torch"
    about = ""
    buffers = ()
    signature = "torch"

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        return None

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        return ("packed", "scale") if segment.symmetric else ("packed", "scale", "zero_point")

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.ops.gamma.torch_linear(
            x, tensors["packed"], tensors["scale"], tensors.get("zero_point"), segment.num_bits
        )

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        return multiply_in_turn(self, segments, tensors, x)


def _linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    rows = packed.shape[0]
    # 32 rows of zero points are a whole number of words at every width.
    block = max(32, BLOCK_ELEMENTS // (packed.shape[1] * 32 // num_bits) // 32 * 32)
    outputs = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        zeros = None if zero_point is None else zero_point[start * num_bits // 32 : -(-stop * num_bits // 32)]
        weight = dequantize(packed[start:stop], scale[start:stop], zeros, num_bits)
        outputs.append(F.linear(x, weight.to(x.dtype)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _fake(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


define(
    "torch_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, int num_bits) -> Tensor",
    _linear,
    _fake,
)
