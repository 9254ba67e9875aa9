"""Which kernels multiply: the fastest that can run here, or what `GAMMA_KERNEL` says."""

import functools
import os
from typing import Protocol

import torch
from torch import Tensor
from vllm.logger import init_logger

from gamma_vllm.kernels import ark, torch_reference
from gamma_vllm.shards import Segment

__all__ = ["Kernel", "choose_kernel"]

_VARIABLE = "GAMMA_KERNEL"


class Kernel(Protocol):
    """What a kernel module offers. `pack` runs once after loading, `linear` in every forward pass.

    `signature` changes with everything that changes the compiled graph; `why_not` says why the kernel cannot run on a
    device, or None; `names` are the tensors that `pack` gives and `linear` takes.
    """

    NAME: str

    def signature(self) -> str: ...

    def why_not(self, device: torch.device) -> str | None: ...

    def names(self, segment: Segment) -> tuple[str, ...]: ...

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor: ...


_KERNELS: dict[str, Kernel] = {"ark": ark, "torch": torch_reference}  # type: ignore[dict-item]
"""In order of preference; the last runs everywhere."""


def choose_kernel(device: torch.device) -> Kernel:
    """The kernels for layers on `device`.

    Raises ValueError on an unknown `GAMMA_KERNEL`, and RuntimeError when that kernel cannot run, saying why.
    """
    wanted = os.environ.get(_VARIABLE, "auto")
    if wanted == "auto":
        kernel = next(kernel for kernel in _KERNELS.values() if kernel.why_not(device) is None)
        _report(kernel.NAME, device.type)
        return kernel
    if wanted not in _KERNELS:
        raise ValueError(f"{_VARIABLE}={wanted!r}: expected auto, {' or '.join(_KERNELS)}")
    reason = _KERNELS[wanted].why_not(device)
    if reason is not None:
        raise RuntimeError(f"{_VARIABLE}={wanted} cannot run: {reason}; use {_VARIABLE}=auto")
    _report(wanted, device.type)
    return _KERNELS[wanted]


@functools.cache
def _report(name: str, device: str) -> None:
    """Log the choice, once a process. vLLM shows loggers of its own namespace."""
    init_logger("vllm.gamma").info("gamma: modules below 16 bits use the %s kernels on %s", name, device)
    if name == torch_reference.NAME:
        for kernel in _KERNELS.values():
            reason = kernel.why_not(torch.device(device))
            if reason is not None:
                init_logger("vllm.gamma").warning("gamma: the reference is slow; %s: %s", kernel.NAME, reason)
