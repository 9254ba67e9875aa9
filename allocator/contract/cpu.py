"""What the CPU at hand can do, and what of it is used: `GAMMA_CPU_ISA` hides the rest. It is read here alone."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["CPU_ISA_VARIABLE", "cpu_flags", "hidden_flags", "why_missing"]

CPU_ISA_VARIABLE = "GAMMA_CPU_ISA"
# What each value hides, by how names begin. AVX2 machines (Zen 3) have no `avx_vnni` and the like either.
_HIDDEN = {"avx2": ("avx512", "avx10", "avx_", "amx"), "avx512": ("amx",), "amx": ()}


def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux names of the first processor ("avx512_bf16", "amx_tile"); empty elsewhere.

    `GAMMA_CPU_ISA=avx2|avx512|amx` means at most this: what is above is left out, and our own kernels do not use it.
    Other libraries ask the processor themselves. Raises ValueError for another value.
    """
    return frozenset(_flags_of_first_processor()) - frozenset(hidden_flags())


def hidden_flags() -> tuple[str, ...]:
    """What the first processor has and `cpu_flags` leaves out. Raises as it does."""
    most = os.environ.get(CPU_ISA_VARIABLE) or "amx"
    if most not in _HIDDEN:
        raise ValueError(f"{CPU_ISA_VARIABLE}={most!r}: expected one of {', '.join(_HIDDEN)}, or nothing")
    return tuple(flag for flag in _flags_of_first_processor() if flag.startswith(_HIDDEN[most]))


def why_missing(wanted: Iterable[str]) -> str | None:
    """Why code that needs these instruction sets cannot run here, or None: it can."""
    missing = [flag for flag in wanted if flag not in cpu_flags()]
    if not missing:
        return None
    hidden = set(missing) <= set(hidden_flags())
    why = f"{CPU_ISA_VARIABLE}={os.environ[CPU_ISA_VARIABLE]} hides" if hidden else "this CPU has no"
    return f"{why} {', '.join(missing)}"


@functools.cache
def _flags_of_first_processor() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    return next((tuple(line.split()) for line in lines if line.startswith("flags")), ())
