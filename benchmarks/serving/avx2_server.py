"""`vllm` as a CPU with AVX2 alone would run it, on one that has more: `python avx2_server.py serve MODEL ...`.

vLLM loads `_C_AVX2` instead of `_C` by what `torch.cpu` says of AVX-512, and picks kernels by the same functions; no
environment variable reaches them, so they are replaced here. vLLM's other processes begin with this file too, whether
they are forked or spawned. `HIDING` does the rest, in libraries that ask the processor themselves.
"""

import sys
from pathlib import Path

import torch

__all__ = ["HIDING"]

HIDING = {
    "GAMMA_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels, and what torch.compile writes
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",  # how that is compiled
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Environment variables of a server. auto-round-lib heeds none, and uses all that the processor has."""


def _hide() -> None:
    for name in dir(torch.cpu):
        if name.startswith(("_is_avx512", "_is_amx", "_is_vnni")) and name.endswith("_supported"):
            setattr(torch.cpu, name, lambda: False)


if __name__ in ("__main__", "__mp_main__"):
    _hide()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = str(Path(sys.executable).parent / "vllm")
    sys.exit(main())
