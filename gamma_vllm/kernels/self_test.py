"""Whether a kernel multiplies rightly on the machine at hand: what it must have shown before it is chosen."""

import torch
from torch import Tensor

from gamma_vllm.kernels.base import Kernel
from gamma_vllm.kernels.torch_reference import TorchKernel
from gamma_vllm.shards import Segment

__all__ = ["failed_self_test"]


def failed_self_test(kernel: Kernel, *, float32: float, bfloat16: float) -> str | None:
    """What the log says when a small product differs from the reference by more than a relative error, else None.

    The product of 3 tokens (decode) has activations in float32, that of 40 (prefill) in bfloat16.
    """
    segment = Segment((0,), 3, 32, False, rows=48, columns=64)
    with torch.device("cpu"):
        tensors = {
            "packed": (torch.arange(48 * 6) * 19088743).to(torch.int32).reshape(48, 6),
            "scale": torch.linspace(0.5, 1.5, 96, dtype=torch.float32).to(torch.bfloat16).reshape(48, 2),
            "zero_point": (torch.arange(10) * 76354972).to(torch.int32).reshape(5, 2),
        }
        decode = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32).reshape(3, 64)
        prefill = torch.linspace(-1, 1, 40 * 64, dtype=torch.float32).reshape(40, 64).to(torch.bfloat16)
    packed = kernel.pack(segment, tensors)

    def error(x: Tensor) -> float:
        expected = TorchKernel().linear(segment, tensors, x.to(torch.float32))
        given = kernel.linear(segment, packed, x).to(torch.float32)
        return float((given - expected).norm() / expected.norm())

    for x, limit in ((decode, float32), (prefill, bfloat16)):
        off = error(x)
        if not off < limit:  # also where it is no number
            return f"its self-test is off by {off:.3g} (relative)"
    return None
