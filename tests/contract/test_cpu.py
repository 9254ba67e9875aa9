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


def test_what_is_missing_is_told_from_what_is_hidden():
    code = CODE.replace("cpu_flags", "why_missing").replace("print(*why_missing())", "print(why_missing({names!r}))")
    told = {}
    for most, names in (("", ["avx2"]), ("", ["avx2", "sse9"]), ("avx2", ["fma", "avx512f", "amx_tile"])):
        program = [sys.executable, "-c", code.format(names=names)]
        done = subprocess.run(program, env=os.environ | {"GAMMA_CPU_ISA": most}, capture_output=True, text=True)
        told[most, len(names)] = done.stdout.strip()
    assert told == {
        ("", 1): "None",
        ("", 2): "this CPU has no sse9",
        ("avx2", 3): "GAMMA_CPU_ISA=avx2 hides avx512f, amx_tile",
    }
