"""Which kernels multiply: the fastest that can run here, or what `GAMMA_KERNEL` says."""

import functools
import os

import torch
from vllm.logger import init_logger

from gamma_vllm.kernels.ark import ArkKernel
from gamma_vllm.kernels.base import Kernel
from gamma_vllm.kernels.humming import HummingKernel
from gamma_vllm.kernels.native import NativeKernel
from gamma_vllm.kernels.torch_reference import TorchKernel

__all__ = ["choose_kernel"]

_VARIABLE = "GAMMA_KERNEL"


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
