"""Which kernels multiply: the fastest that can run here, or what `GAMMA_KERNEL` says."""

import functools
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from vllm.logger import init_logger

from gamma_vllm.kernels.ark import ArkKernel
from gamma_vllm.kernels.humming import HummingKernel
from gamma_vllm.kernels.native import NativeKernel
from gamma_vllm.kernels.torch_reference import TorchKernel
from gamma_vllm.shards import Segment

__all__ = ["Kernel", "choose_kernel"]

_VARIABLE = "GAMMA_KERNEL"


class Kernel(Protocol):
    """What a kernel offers. `signature` changes with everything that changes the compiled graph."""

    name: str
    buffers: tuple[str, ...]
    """Which of the tensors are work space. vLLM's sleep keeps buffers and discards parameters."""

    @property
    def signature(self) -> str: ...

    @property
    def about(self) -> str:
        """What the log says of it beside its name; may be empty."""

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Why the kernel cannot run on `device`, or None."""

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        """The tensors that `pack` gives and `linear` takes. None is called `weight`: that is the one of 16 bits, and
        experts of all widths keep tensors of one name together."""

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Once after loading: `packed`, `scale` and, if asymmetric, `zero_point` to what the kernel reads."""

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """`x` `[..., columns]` times the segment: `[..., rows]`, in the dtype of `x`."""

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        """`x` times all segments of a layer, joined: a new tensor `[..., sum of rows]`, in the dtype of `x`.

        A segment of 16 bits has one tensor, `weight`.
        """


_KERNELS: dict[str, type[Kernel]] = {
    "humming": HummingKernel,
    "native": NativeKernel,
    "ark": ArkKernel,
    "torch": TorchKernel,
}
"""In order of preference; the last runs everywhere."""


def choose_kernel(device: torch.device) -> Kernel:
    """The kernel for layers on `device`.

    Raises ValueError on an unknown `GAMMA_KERNEL`, and RuntimeError when that kernel cannot run, saying why.
    """
    wanted = os.environ.get(_VARIABLE, "auto")
    if wanted == "auto":
        wanted = next(name for name, kernel in _KERNELS.items() if kernel.why_not(device) is None)
    if wanted not in _KERNELS:
        *others, last = _KERNELS
        raise ValueError(f"{_VARIABLE}={wanted!r}: expected auto, {', '.join(others)} or {last}")
    reason = _KERNELS[wanted].why_not(device)
    if reason is not None:
        raise RuntimeError(f"{_VARIABLE}={wanted} cannot run: {reason}; use {_VARIABLE}=auto")
    kernel = _KERNELS[wanted]()
    _report(wanted, kernel.about, device.type)
    return kernel


@functools.cache
def _report(name: str, about: str, device: str) -> None:
    """Log the choice, once a process. vLLM shows loggers of its own namespace."""
    logger = init_logger("vllm.gamma")
    detail = f" ({about})" if about else ""
    logger.info("gamma: modules below 16 bits use the %s kernel on %s%s", name, device, detail)
    if name == TorchKernel.name:
        reasons = {n: k.why_not(torch.device(device)) for n, k in _KERNELS.items() if n != name}
        told = "; ".join(f"{n}: {reason}" for n, reason in reasons.items() if reason is not None)
        logger.warning("gamma: the torch kernel is exact and slow%s", f" ({told})" if told else "")
