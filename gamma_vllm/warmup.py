"""What `gamma warmup` runs: compiles ahead for the kernel that is chosen here. Reads JSON, prints a line of JSON."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.kernels.native import NativeKernel, build

__all__ = ["warm_up"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def warm_up(request: dict[str, Any]) -> dict[str, Any]:
    """`{"dtype", "segments": [{"rows", "columns", "num_bits", "group_size", "symmetric"}]}` to what was done."""
    torch.set_default_dtype(_DTYPES[request["dtype"]])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel, started = choose_kernel(device), time.perf_counter()
    if kernel.name == "humming":
        compiled = _compile_humming(request, device)
        told = f"humming: {compiled} kernels"
    elif isinstance(kernel, NativeKernel):
        compiled, told = 1, f"native: {build(kernel.isa)}"
    else:
        compiled, told = 0, f"{kernel.name}: nothing to compile"
    seconds = round(time.perf_counter() - started, 2)
    return {"kernel": kernel.name, "compiled": compiled, "seconds": seconds, "told": f"{told}, {seconds} s"}


def _compile_humming(request: dict[str, Any], device: torch.device) -> int:
    """All kernels that a product may need, at every number of tokens; humming keeps them on disk.

    A processor compiles one (shape, width) after the other: there are more of these than processors, and each has few
    kernels.
    """
    from humming.utils.cpu import get_parallel_build_workers

    from gamma_vllm.kernels.humming import kernels_of

    dtype = _DTYPES[request["dtype"]]
    device = torch.device(device.type, torch.cuda.current_device())

    def compile_pair(s: dict[str, Any]) -> set[int]:
        made = kernels_of(s["rows"], s["columns"], s["group_size"], s["num_bits"], not s["symmetric"], dtype, device)
        return set(made.reshape(-1, 4)[:, 2].tolist())

    workers = get_parallel_build_workers()
    os.environ["HUMMING_MAX_PARALLEL_BUILD_WORKERS"] = "1"
    with ThreadPoolExecutor(workers) as pool:
        return len(set().union(*pool.map(compile_pair, request["segments"])))


if __name__ == "__main__":
    result = warm_up(json.load(sys.stdin))
    print(json.dumps(result))
