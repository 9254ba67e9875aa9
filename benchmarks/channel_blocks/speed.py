"""What channel blocks cost at decode: one gate_up_proj as large as that of Llama-3.1-8B, whole and cut, on the CPU."""

import tempfile
import time
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel

from allocator.contract.channel_blocks import ChannelBlocks
from allocator.contract.layout import ModuleFormat, module_tensors
from gamma_vllm.linear import GammaLinearMethod
from gamma_vllm.pieces import GammaPiecesMethod
from gamma_vllm.shards import CheckpointModule

__all__ = ["measure_decode"]

HIDDEN, INTERMEDIATE, GROUP, LAYOUT = 4096, 14336, 128, ChannelBlocks(blocks=8, chunks=8)
WHOLE = (2, 3, 4, 5)
CUT: dict[str, tuple[list[int], list[int]]] = {
    "cut, all at 3 bits": ([3] * 8, [3] * 8),
    "cut, 4 to 2 bits, gate and up alike": ([4, 4, 3, 3, 3, 3, 2, 2],) * 2,
    "cut, 5 to 2 bits, gate and up differ": ([5, 4, 3, 3, 3, 2, 2, 2], [4, 3, 3, 3, 3, 3, 3, 2]),
}
"""Bits of the pieces of gate_proj and up_proj."""
REPEATS, RUNS = 15, 20


def measure_decode() -> list[dict[str, Any]]:
    """CPU milliseconds of one token through each layer; they take turns, the best of the repeats counts.

    For a layer that is cut also what its weights take in whole layers, each at its width.
    """
    config = VllmConfig()
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel()
    widths = {f"whole, {bits} bits": ([bits], [bits]) for bits in WHOLE} | CUT
    layers = {kind: _layer(*of_layer) for kind, of_layer in widths.items()}
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    best = dict.fromkeys(layers, float("inf"))
    with torch.inference_mode():
        for _ in range(REPEATS):
            for kind, (layer, method) in layers.items():
                start = time.process_time()
                for _ in range(RUNS):
                    method.apply(layer, x)
                best[kind] = min(best[kind], (time.process_time() - start) / RUNS)
    rows = []
    for kind, (gate, up) in widths.items():
        alone = [best[f"whole, {bits} bits"] for bits in (*gate, *up)]
        milliseconds, of_whole = (round(1000 * s, 4) for s in (best[kind], sum(alone) / len(alone)))
        rows.append({"layer": kind, "milliseconds": milliseconds, "milliseconds_of_whole": of_whole})
        print(f"  {kind}: {milliseconds:.3f} ms, its weights in whole modules {of_whole:.3f} ms", flush=True)
    return rows


def _layer(gate: list[int], up: list[int]) -> tuple[nn.Module, Any]:
    """A layer as vLLM makes it, with random codes, after loading."""
    layer = nn.Module()
    layer.prefix, layer.tp_rank, layer.tp_size = "mlp.gate_up_proj", 0, 1
    rows = INTERMEDIATE // len(gate)
    pairs = [
        [_module(f"mlp.{name}_proj.rows.{i}", rows, bits) for name, bits in (("gate", g), ("up", u))]
        for i, (g, u) in enumerate(zip(gate, up, strict=True))
    ]
    method: Any = GammaLinearMethod(pairs[0], "BF16") if len(pairs) == 1 else GammaPiecesMethod(pairs, LAYOUT, "BF16")
    method.create_weights(layer, HIDDEN, [INTERMEDIATE] * 2, HIDDEN, 2 * INTERMEDIATE, torch.bfloat16)
    for pair, part in zip(pairs, [layer] if len(pairs) == 1 else layer.rows, strict=True):
        for shard, module in enumerate(pair):
            for tensor in module_tensors("", module.format, "BF16"):
                parameter = getattr(part, tensor.name[1:])
                parameter.weight_loader(parameter, _random(tensor.name[1:], tensor.shape, module), shard)
        (method if len(pairs) == 1 else part.quant_method).process_weights_after_loading(part)
    return layer, method


def _module(name: str, rows: int, bits: int) -> CheckpointModule:
    return CheckpointModule(name, ModuleFormat(shape=(rows, HIDDEN), num_bits=bits, group_size=GROUP, symmetric=True))  # type: ignore[arg-type]


def _random(part: str, shape: tuple[int, ...], module: CheckpointModule) -> torch.Tensor:
    if part == "weight_packed":
        return torch.randint(-(1 << 31), 1 << 31, shape).int()
    if part == "weight_scale":
        return torch.full(shape, 0.01, dtype=torch.bfloat16)
    return torch.tensor(module.format.shape)
