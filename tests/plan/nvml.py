"""A libnvidia-ml.so.1 with the GPUs of one's choice, which nvidia-ml-py calls as it does the driver's."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.skips import lacking

__all__ = ["L4", "NEEDED", "Card", "library"]

ENVIRONMENT = dict(os.environ)
COMPILER = shutil.which("cc") or shutil.which("gcc")
NEEDED = [
    pytest.mark.skipif(COMPILER is None, reason=lacking("program", "a C compiler is not here")),
    pytest.mark.skipif(find_spec("pynvml") is None, reason=lacking("package", "nvidia-ml-py is not here")),
]

# Signatures and structures as NVIDIA documents them for NVML; a device handle is an index, a MIG slice 100 + its place.
SOURCE = """
typedef unsigned long long u64;
struct card {{ const char *name; u64 bytes; int major, minor, slices; u64 slice_bytes; }};
static struct card cards[] = {{ {cards} }};
static const int count = {count};
int nvmlInitWithFlags(unsigned flags) {{ {init} }}
int nvmlShutdown(void) {{ return 0; }}
const char *nvmlErrorString(int code) {{ return "error"; }}
int nvmlDeviceGetCount_v2(unsigned *found) {{ *found = count; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) {{
    *handle = (void *)(u64)(i + 1);
    return i < count ? 0 : 2;
}}
static struct card *of(void *handle) {{ return &cards[((u64)handle - 1) % 100]; }}
int nvmlDeviceGetName(void *handle, char *to, unsigned length) {{
    const char *from = of(handle)->name;
    unsigned i = 0;
    for (; from[i] && i + 1 < length; i++) to[i] = from[i];
    to[i] = 0;
    return 0;
}}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {{
    *major = of(handle)->major;
    *minor = of(handle)->minor;
    return 0;
}}
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending) {{
    *now = *pending = of(handle)->slices > 0;
    return of(handle)->slices < 0 ? 3 : 0; /* not supported */
}}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *most) {{ *most = 7; return 0; }}
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned i, void **slice) {{
    *slice = (void *)((u64)handle + 100);
    return i < (unsigned)of(handle)->slices ? 0 : 6; /* not found */
}}
struct memory {{ u64 total, free, used; }};
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *to) {{
    to->total = (u64)handle > 100 ? of(handle)->slice_bytes : of(handle)->bytes;
    to->free = to->total;
    to->used = 0;
    return 0;
}}
"""


@dataclass(frozen=True)
class Card:
    name: str
    mib: int
    capability: tuple[int, int] = (8, 9)
    slices: int = -1
    slice_mib: int = 0


L4 = Card("NVIDIA L4", 23034)


def library(folder: Path, *cards: Card, init: str = "return 0;") -> None:
    """Compile it to `folder`, for LD_LIBRARY_PATH. `init` is the body of nvmlInit."""
    rows = [
        f'{{"{c.name}", {c.mib}ULL << 20, {c.capability[0]}, {c.capability[1]}, {c.slices}, {c.slice_mib}ULL << 20}}'
        for c in cards or (Card("none", 1),)
    ]
    (folder / "nvml.c").write_text(SOURCE.format(cards=", ".join(rows), count=len(cards), init=init))
    command = [str(COMPILER), "-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(command, check=True, env=ENVIRONMENT)
