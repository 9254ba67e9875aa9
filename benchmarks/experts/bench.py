"""A layer of experts on CPU: its widths against vLLM's own experts in bfloat16, and what widths of their own cost.

    make bench-experts

One layer of the shape of Qwen3-30B-A3B (hidden size 2048, 128 experts of 768, 8 for each token), random codes, our
kernel on one thread. The experts in bfloat16 are those at 3 bits, dequantized, in vLLM's order for its own operator;
both must give the same. Each run routes anew, so that weights come from memory as they do in a model. The kinds take
turns; the best of the repeats counts, in CPU seconds. Writes benchmarks/results/experts.json.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "GAMMA_KERNEL": "native"}
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from vllm import _custom_ops as vllm_ops  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (  # noqa: E402
    UnquantizedMoeBackend,
    backend_to_kernel_cls,
)

from allocator.contract.layout import ModuleFormat, module_tensors  # noqa: E402
from allocator.contract.packing import dequantize  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402
from gamma_vllm.moe import ExpertModules, GammaMoEMethod  # noqa: E402
from gamma_vllm.shards import CheckpointModule  # noqa: E402

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, GROUP = 2048, 768, 128, 8, 128
SEED, REPEATS = 0, 9
TOKENS = {1: 40, 8: 6, 64: 2, 512: 1}
"""Tokens at a time -> runs a repeat."""

BFLOAT16, SAME = "bfloat16, vLLM's own", "all at 3 bits"
"""The second has the weights of the first."""
KINDS = {
    "all at 3 bits": lambda expert, part: 3,
    "all at 4 bits": lambda expert, part: 4,
    "all at 5 bits": lambda expert, part: 5,
    "w13 and w2 differ": lambda expert, part: 5 if part == "down" else 4,
    "experts differ": lambda expert, part: (3, 4, 5, 4)[expert % 4],
    "gate and up differ": lambda expert, part: {"gate": 3, "up": 5, "down": 4}[part],
    "all at 16 bits": lambda expert, part: 16,
}
SHARES = {
    "w13 and w2 differ": (0, 2 / 3, 1 / 3),
    "experts differ": (1 / 4, 1 / 2, 1 / 4),
    "gate and up differ": (1 / 3, 1 / 3, 1 / 3),
}
"""Kind -> the shares of its weights at 3, 4 and 5 bits: what it would take if every weight took what it takes alone."""

SHARD_IDS = {"gate": "w1", "up": "w3", "down": "w2"}
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From x [tokens, hidden], weights and ids [tokens, choices] to the sums [tokens, hidden]."""


class Layer(nn.Module):
    """As vLLM makes it, with random codes; `width(expert, part)` are its bits. weights: of each expert's parts in
    bfloat16, if they are `kept`."""

    def __init__(self, width: Callable[[int, str], int], kept: bool):
        super().__init__()
        self.layer_name, self.activation = "experts", MoEActivation.SILU
        self.apply_router_weight_on_input, self.expert_map = False, None
        self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None
        self.expert_map_manager = SimpleNamespace(map_global_to_local=lambda expert: expert)
        self.moe_config = SimpleNamespace(
            has_bias=False, is_act_and_mul=True, tp_rank=0, tp_size=1,
            activation_situ_beta=None, activation_situ_linear_beta=None,
        )  # fmt: skip
        self.weights: dict[str, list[Tensor]] = {part: [] for part in SHARD_IDS}
        self.bytes_of_expert = 0

        def module(expert: int, part: str) -> CheckpointModule:
            shape = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
            bits = width(expert, part)
            if bits == 16:
                return CheckpointModule(f"experts.{expert}.{part}_proj", ModuleFormat(shape=shape, num_bits=16))
            form = ModuleFormat(shape=shape, num_bits=bits, group_size=GROUP, symmetric=True)
            return CheckpointModule(f"experts.{expert}.{part}_proj", form)

        experts = [{part: module(i, part) for part in SHARD_IDS} for i in range(EXPERTS)]
        joined = [ExpertModules((e["gate"], e["up"]), e["down"]) for e in experts]
        self.quant_method = GammaMoEMethod(self, joined, "BF16")
        self.quant_method.create_weights(self, EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16)
        for i, expert in enumerate(experts):
            for part, of in expert.items():
                self._load(i, part, of, kept)
        self.quant_method.process_weights_after_loading(self)
        self.bytes_of_expert = sum(p.nbytes for p in self.parameters()) / EXPERTS

    def _load(self, expert: int, part: str, module: CheckpointModule, kept: bool) -> None:
        contents = {}
        for tensor in module_tensors("", module.format, "BF16"):
            name = tensor.name[1:]
            if name == "weight_packed":
                content = torch.randint(-(1 << 31), 1 << 31, tensor.shape).to(torch.int32)
            elif name == "weight_shape":
                content = torch.tensor(module.format.shape)
            else:
                content = (torch.rand(tensor.shape) / 64).to(torch.bfloat16)
            contents[name] = content
            target = getattr(self, f"{'w2' if part == 'down' else 'w13'}_{name}")
            target.weight_loader(target, content, weight_name="", shard_id=SHARD_IDS[part], expert_id=expert)
        if kept:
            whole = dequantize(contents["weight_packed"], contents["weight_scale"], None, module.format.num_bits)
            self.weights[part].append(whole.to(torch.bfloat16))

    def multiply(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.quant_method.multiply(self, x, weights, ids)


def vllm_experts(weights: dict[str, list[Tensor]]) -> Experts:
    """vLLM's operator for experts that are not quantized, as it chooses it for this CPU. Takes `weights` away."""
    classes = backend_to_kernel_cls(UnquantizedMoeBackend.CPU)
    isa = next(c for c in classes if c._supports_current_device()).isa
    gate_up = torch.stack([torch.cat(pair) for pair in zip(weights["gate"], weights["up"], strict=True)])
    down = torch.stack(weights["down"])
    weights.clear()
    w13, w2 = vllm_ops.cpu_prepack_moe_weight(gate_up, isa), vllm_ops.cpu_prepack_moe_weight(down, isa)
    del gate_up, down

    def multiply(x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        output = torch.empty_like(x)
        vllm_ops.cpu_fused_moe(output, x, w13, w2, None, None, shares, ids, "silu", isa, False)
        return output

    return multiply


def measure(kinds: dict[str, Experts], tokens: int, runs: int) -> dict[str, float]:
    """CPU microseconds of one pass, by kind."""
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(REPEATS):
        x, shares = torch.randn(tokens, HIDDEN).to(torch.bfloat16), torch.rand(tokens, TOP_K)
        routes = [
            torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32) for _ in range(runs)
        ]
        for kind, multiply in kinds.items():
            start = time.process_time()
            for ids in routes:
                multiply(x, shares, ids)
            best[kind] = min(best[kind], (time.process_time() - start) / runs * 1e6)
    return best


def check(kinds: dict[str, Experts]) -> None:
    """Raises AssertionError where the experts at 3 bits and the same in bfloat16 differ by more than rounding."""
    for tokens in TOKENS:
        x, shares = torch.randn(tokens, HIDDEN).to(torch.bfloat16), torch.rand(tokens, TOP_K)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
        ours, theirs = (kinds[kind](x, shares, ids).float() for kind in (SAME, BFLOAT16))
        assert (ours - theirs).norm() < 1e-2 * theirs.norm(), f"{tokens} tokens: results differ"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel()
        layers: dict[str, Layer] = {}
        kinds: dict[str, Experts] = {}
        for kind, width in KINDS.items():
            layer = layers[kind] = Layer(width, kept=kind == SAME)
            if kind == SAME:
                kinds[BFLOAT16] = vllm_experts(layer.weights)
            kinds[kind] = layer.multiply
        check(kinds)
        of_bytes = {kind: layer.bytes_of_expert / (3 * HIDDEN * INTERMEDIATE * 2) for kind, layer in layers.items()}
        rows = []
        for tokens, runs in TOKENS.items():
            microseconds = measure(kinds, tokens, runs)
            alone = [microseconds[f"all at {bits} bits"] for bits in (3, 4, 5)]
            for kind, value in microseconds.items():
                row = {"tokens": tokens, "kind": kind, "cpu_microseconds": round(value)}
                if kind != BFLOAT16:
                    row["over_bfloat16"] = round(value / microseconds[BFLOAT16], 3)
                    row["bytes_over_bfloat16"] = round(of_bytes[kind], 3)
                if kind in SHARES:
                    expected = sum(share * of_one for share, of_one in zip(SHARES[kind], alone, strict=True))
                    row["over_uniform"] = round(value / expected, 3)
                rows.append(row)
                print(row, flush=True)
    print(f"written: {write_result('experts', 'make bench-experts', [SEED], rows, claims_of(rows)).relative_to(ROOT)}")


def claims_of(rows: list[dict]) -> list[dict]:
    claims = []
    for row in rows:
        if row["kind"] == SAME:
            decode = row["tokens"] <= 8
            limit = row["bytes_over_bfloat16"] if decode else 1.05
            text = f"time of experts at 3 bits over vLLM's own in bfloat16, {row['tokens']} tokens"
            text += " (the limit is what their bytes say)" if decode else ""
            claims.append(claim(text, row["over_bfloat16"], f"<= {limit}", row["over_bfloat16"] <= limit))
    for kind in SHARES:
        worst = max(row["over_uniform"] for row in rows if row["kind"] == kind)
        text = f"time of a layer where {kind}, over that of uniform layers in the same shares, at worst"
        claims.append(claim(text, worst, "<= 1.1", worst <= 1.1))
    return claims


if __name__ == "__main__":
    main()
