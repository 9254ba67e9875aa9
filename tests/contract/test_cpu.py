"""What the CPU is said to have, and how instructions are hidden."""

import os
import subprocess
import sys

import pytest

PROCESSOR = {"fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16"}
SEEN = {
    "": PROCESSOR,
    "amx": PROCESSOR,
    "avx512": PROCESSOR - {"amx_tile", "amx_bf16"},
    "avx2": {"fma", "f16c", "avx2"},
}
CODE = f"""
from pathlib import Path
Path.read_text = lambda path, **options: "processor : 0\\nflags : {" ".join(PROCESSOR)}\\n"
from allocator.contract.cpu import cpu_flags
print(*cpu_flags())
"""


def flags(most):
    """Those of `PROCESSOR`, whatever is here, as another process sees them."""
    environment = os.environ | {"GAMMA_CPU_ISA": most}
    return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("most", SEEN)
def test_instructions_above_the_variable_are_hidden(most):
    assert set(flags(most).stdout.split()) - {"flags", ":"} == SEEN[most]


def test_another_value_of_the_variable_is_refused():
    assert "GAMMA_CPU_ISA='sse': expected one of avx2, avx512, amx, or nothing" in flags("sse").stderr
