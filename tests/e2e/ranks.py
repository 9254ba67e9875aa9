"""Two ranks of vLLM, each on a core of its own: of those that this process may use, which need not begin with 0."""

import os

import pytest

from tests.skips import lacking

__all__ = ["HAS_TWO_CORES", "TWO_RANKS", "needs_two_cores"]

_CORES = sorted(os.sched_getaffinity(0))
HAS_TWO_CORES = len(_CORES) > 1
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, _CORES[:2]))}
needs_two_cores = pytest.mark.skipif(not HAS_TWO_CORES, reason=lacking("system", "two ranks need two CPU cores"))
