"""Products of the CUDA kernels, layer by layer, on an NVIDIA GPU.

    make bench-kernels

The layers of Qwen3-8B and Qwen3-32B at 1 to 512 tokens: humming at every width through the plugin's own adapter,
bfloat16 (`F.linear`) and Marlin's 4 bits, groups of 128. Weights are cold: enough copies take turns that the L2 cache
holds none, all of them in one captured graph, as vLLM replays a step; a figure is the median of the replays, over the
copies. Also: fused layers of several widths against one width, humming's choice of a kernel for every eight tokens
against ours for a few, and what compiling took of what humming's cache did not have. Writes
benchmarks/results/kernels_cuda.json.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.contract.packing import pack_zero_points, unpack_codes  # noqa: E402
from benchmarks.record import claim, read_rows, rewrite_claims, write_result  # noqa: E402
from gamma_vllm.kernels import humming as adapter  # noqa: E402
from gamma_vllm.kernels.humming import HummingKernel  # noqa: E402
from gamma_vllm.shards import Segment  # noqa: E402

GROUP, DTYPE = 128, torch.bfloat16
SHAPES = {
    "Qwen3-8B q_proj, o_proj": (4096, 4096),
    "Qwen3-8B gate_proj": (12288, 4096),
    "Qwen3-8B down_proj": (4096, 12288),
    "Qwen3-32B q_proj": (8192, 5120),
    "Qwen3-32B o_proj": (5120, 8192),
    "Qwen3-32B gate_proj": (25600, 5120),
    "Qwen3-32B down_proj": (5120, 25600),
}
"""Rows and columns, as published."""
EVERY_WIDTH = ("Qwen3-8B gate_proj", "Qwen3-32B gate_proj")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FUSED = {
    "Qwen3-8B qkv_proj": (4096, [(4096, 3), (1024, 4), (1024, 5)], [(6144, 3)]),
    "Qwen3-8B gate_up_proj": (4096, [(12288, 2), (12288, 3)], [(24576, 3)]),
    "Qwen3-32B gate_up_proj": (5120, [(25600, 2), (25600, 3)], [(51200, 3)]),
}
"""Columns, and (rows, width) of its modules: free, and tied as fusion would have them."""
FEW = ("Qwen3-8B q_proj, o_proj", "Qwen3-8B gate_proj", "Qwen3-32B gate_proj", "Qwen3-32B down_proj")
FEW_TOKENS = (1, 8, 64, 512, 2048)
BETWEEN = (24, 40, 72, 104, 136, 160, 200, 300, 400, 600, 1000, 2048, 3000)
"""Tokens where humming's own choice differs from ours, and prefills."""
COLD_BYTES, REPLAYS = 200e6, 9
RESULT, SEED = "kernels_cuda", 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", action="store_true", help="the claims of the kept rows anew, measure nothing")
    parser.add_argument("--few", type=Path, metavar="FILE", help="only what a minute on a card can show, to FILE")
    args = parser.parse_args()
    if args.claims:
        rewrite_claims(RESULT, list(_claims(read_rows(RESULT))))
        return
    torch.manual_seed(SEED)
    device = torch.device("cuda", 0)
    torch.set_default_dtype(DTYPE)
    kernel = HummingKernel(DTYPE)
    bandwidth = _copy_bandwidth()
    rows: list[dict[str, Any]] = [{"copy_gb_per_s": round(bandwidth / 1e9)}]
    if args.few:
        _measure_few(kernel, bandwidth, rows, args.few, device)
        return
    for name, (out, columns) in SHAPES.items():
        rows.append({"layer": name, "kernel": "bfloat16", **_bfloat16(out, columns, device)})
        rows.append({"layer": name, "kernel": "marlin, 4 bits", **_marlin(out, columns, device)})
        for bits in (2, 3, 4, 5, 6, 8) if name in EVERY_WIDTH else (2, 3, 4):
            figures = _humming(kernel, [(out, bits)], columns, device)
            limit = round(figures["nbytes"] / bandwidth * 1e6, 2)
            rows.append({"layer": name, "kernel": f"humming, {bits} bits", "bits": bits, "limit_us": limit, **figures})
        print(f"{name} done", flush=True)
    for name, (columns, free, tied) in FUSED.items():
        for kind, modules in (("free", free), ("tied", tied)):
            rows.append(
                {"layer": name, "kernel": kind, "modules": modules, **_humming(kernel, modules, columns, device)}
            )
    rows.append({"layer": "Qwen3-8B gate_proj", "kernel": "between", **_between(kernel, device)})
    _finish(rows)


def _measure_few(
    kernel: HummingKernel, bandwidth: float, rows: list[dict[str, Any]], file: Path, device: torch.device
) -> None:
    """Layers of 8B and 32B shapes at 3 bits, and their fused ones with free widths and one; FILE after each row."""
    for name in FEW:
        out, columns = SHAPES[name]
        for kernel_name, figures in (
            ("bfloat16", _bfloat16(out, columns, device, FEW_TOKENS)),
            ("humming, 3 bits", _humming(kernel, [(out, 3)], columns, device, FEW_TOKENS)),
        ):
            limit = round(figures["nbytes"] / bandwidth * 1e6, 2)
            rows.append({"layer": name, "kernel": kernel_name, "limit_us": limit, **figures})
            write_atomically(file, json.dumps(rows, indent=1))
    for name, (columns, free, tied) in FUSED.items():
        for kind, modules in (("free", free), ("free, side by side", free), ("tied", tied)):
            os.environ["GAMMA_HUMMING_SEGMENTS"] = "side-by-side" if "side" in kind else "in-turn"
            figures = _humming(kernel, modules, columns, device, FEW_TOKENS)
            rows.append({"layer": name, "kernel": kind, "modules": modules, **figures})
            write_atomically(file, json.dumps(rows, indent=1))


def _humming(
    kernel: HummingKernel,
    modules: list[tuple[int, int]],
    columns: int,
    device: torch.device,
    at_tokens: Sequence[int] = TOKENS,
) -> dict[str, Any]:
    """Microseconds by tokens, the largest relative error against float32, bytes held, seconds of compiling."""
    segments, held, dense = [], [], []
    for rows, bits in modules:
        segment = Segment((0,), bits, GROUP, False, rows, columns)
        tensors, weight = _random_module(rows, columns, bits, device)
        segments.append(segment)
        held.append(kernel.pack(segment, tensors))
        dense.append(weight)
    begun = time.perf_counter()
    for segment in segments:
        adapter.kernels_of(segment.rows, columns, GROUP, segment.num_bits, True, DTYPE, device)
    compiling = time.perf_counter() - begun
    weight, errors, figures = torch.cat(dense), [], {}
    nbytes = sum(t.nbytes for tensors in held for name, t in tensors.items() if name != "locks")
    many = [
        held,
        *([{n: t.clone() for n, t in tensors.items()} for tensors in held] for _ in range(_copies(nbytes) - 1)),
    ]

    def multiply(x: Tensor, held: list[dict[str, Tensor]]) -> Tensor:
        return kernel.layer(segments, held, x)

    for tokens in at_tokens:
        x = torch.randn(tokens, columns, device=device)
        exact = x.float() @ weight.T
        errors.append(float((multiply(x, held).float() - exact).norm() / exact.norm()))
        figures[str(tokens)] = _microseconds(multiply, x, many)
    error = round(max(errors), 5)
    return {"nbytes": nbytes, "relative_error": error, "compile_s": round(compiling, 2), "us": figures}


def _random_module(rows: int, columns: int, bits: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes, scales and zero points as a checkpoint has them, and the float32 weight that they mean."""
    packed = torch.randint(-(2**31), 2**31, (rows, columns * bits // 32), device=device).to(torch.int32)
    scale = ((torch.rand(rows, columns // GROUP, device=device) + 0.5) * 0.04 / 2**bits).to(DTYPE)
    zeros = torch.randint(0, 2**bits, (rows, columns // GROUP), device=device).to(torch.uint8)
    tensors = {"packed": packed, "scale": scale, "zero_point": pack_zero_points(zeros, bits)}
    codes = unpack_codes(packed, bits).reshape(rows, -1, GROUP).float() - zeros.float().unsqueeze(-1)
    return tensors, (codes * scale.float().unsqueeze(-1)).reshape(rows, columns)


def _bfloat16(rows: int, columns: int, device: torch.device, at_tokens: Sequence[int] = TOKENS) -> dict[str, Any]:
    many = [torch.randn(rows, columns, device=device) * 0.02 for _ in range(_copies(2 * rows * columns))]
    figures = {}
    for tokens in at_tokens:
        x = torch.randn(tokens, columns, device=device)
        figures[str(tokens)] = _microseconds(F.linear, x, many)
    return {"nbytes": many[0].nbytes, "us": figures}


def _marlin(rows: int, columns: int, device: torch.device) -> dict[str, Any]:
    """vLLM's Marlin, symmetric, as stock 4-bit checkpoints are."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_workspace_new,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    weight = torch.randn(columns, rows, device=device) * 0.02
    exact, codes, scale = marlin_quantize(weight, kind, GROUP)
    none, workspace = torch.empty(0, dtype=torch.int, device=device), marlin_make_workspace_new(device, 4)
    nbytes, figures, errors = codes.nbytes + scale.nbytes, {}, []
    many = [(codes.clone(), scale.clone()) for _ in range(_copies(nbytes))]

    def multiply(x: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        made: Tensor = apply_gptq_marlin_linear(x, *held, none, workspace, kind, rows, columns)
        return made

    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device=device)
        product = x.float() @ exact.float()
        errors.append(float((multiply(x, many[0]).float() - product).norm() / product.norm()))
        figures[str(tokens)] = _microseconds(multiply, x, many)
    return {"nbytes": nbytes, "relative_error": round(max(errors), 5), "us": figures}


def _between(kernel: HummingKernel, device: torch.device) -> dict[str, Any]:
    """Microseconds at 3 bits by our few kernels and by humming's own choice for the same tokens."""
    from humming.kernel.humming import HummingKernel as Library
    from humming.ops import launch_kernel
    from humming.tune import get_heuristics_config

    rows, columns = SHAPES["Qwen3-8B gate_proj"]
    segment = Segment((0,), 3, GROUP, False, rows, columns)
    held = kernel.pack(segment, _random_module(rows, columns, 3, device)[0])
    config = adapter.layer_config(rows, columns, GROUP, 3, True, DTYPE, device)
    settings = json.loads(adapter.compute_config())
    nbytes = sum(t.nbytes for name, t in held.items() if name != "locks")
    many = [{name: t.clone() for name, t in held.items()} for _ in range(_copies(nbytes))]
    ours, theirs = {}, {}
    for tokens in BETWEEN:
        x = torch.randn(tokens, columns, device=device)
        tuned = json.dumps(get_heuristics_config(config, shape_m=tokens, device=device, **settings))
        configs = Library.prepare_kernels(config.to_str(), adapter.compute_config(), tuned, device)

        def multiply(x: Tensor, held: dict[str, Tensor], configs: Tensor = configs) -> Tensor:
            tensors = {"weight": held["packed"], "weight_scale": held["scale"], "zero_point": held["zero_point"]}
            made: Tensor = launch_kernel(configs=configs, inputs=x, locks=held["locks"], **tensors)
            return made

        ours[str(tokens)] = _microseconds(partial(_linear, kernel, segment), x, many)
        theirs[str(tokens)] = _microseconds(multiply, x, many)
    return {"bits": 3, "us": ours, "humming_choice_us": theirs}


def _linear(kernel: HummingKernel, segment: Segment, x: Tensor, held: dict[str, Tensor]) -> Tensor:
    return kernel.linear(segment, held, x)


def _copies(nbytes: int) -> int:
    return max(4, min(64, math.ceil(COLD_BYTES / nbytes)))


def _copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB within the GPU's memory."""
    source = torch.empty(1 << 30, dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_median(lambda: target.copy_(source)) * 1e-3)


def _microseconds(multiply: Callable[[Tensor, Any], Any], x: Tensor, many: Sequence[Any]) -> float:
    """A product, of all with each of `many` captured in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for weights in many[:2]:
            multiply(x, weights)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in many:
            multiply(x, weights)
    return round(_median(graph.replay) * 1e3 / len(many), 2)


def _median(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    for _ in range(2):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def _claims(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    by_name = {(row["layer"], row["kernel"]): row for row in rows if "layer" in row}
    measured = [row for row in rows if "relative_error" in row and "humming" in row["kernel"]]
    value = max(row["relative_error"] for row in measured)
    yield claim("largest relative error of humming against float32", value, "<= 0.01", value <= 0.01)
    for name in SHAPES:
        value = by_name[name, "bfloat16"]["us"]["1"] / by_name[name, "humming, 3 bits"]["us"]["1"]
        why = None if value >= 2.2 else "2, 3 and 4 bits take the same time: bytes are not what counts; see limit_us"
        yield claim(f"{name}: one token at 3 bits, speed over bfloat16", round(value, 3), ">= 2.2", value >= 2.2, why)
    between = by_name["Qwen3-8B gate_proj", "between"]
    value = max(between["us"][t] / between["humming_choice_us"][t] for t in between["us"])
    why = None if value <= 1.1 else "see humming_choice_us"
    yield claim("time by few kernels over humming's own choice, worst", round(value, 3), "<= 1.1", value <= 1.1, why)


def _finish(rows: list[dict[str, Any]]) -> None:
    claims = list(_claims(rows))
    for row in rows:
        print(row)
    for entry in claims:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']} ({entry['limit']})")
    path = write_result(RESULT, "make bench-kernels", [SEED], rows, claims)
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
