"""What widths of their own cost a layer of experts on CPU, against one width for all.

    make bench-experts

One layer of the shape of Qwen3-30B-A3B (hidden size 2048, experts of 768, 8 for each token; 16 experts in place of 128,
so that it is made in a minute), random codes, ARK kernels on one thread. The kinds take turns; the best of the repeats
counts, in CPU seconds. Writes benchmarks/results/experts.json.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"OMP_NUM_THREADS": "1", "GAMMA_KERNEL": "ark", "GAMMA_ARK_COMPUTE": "int8"}
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402

from allocator.contract.layout import ModuleFormat, module_tensors  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402
from gamma_vllm.moe import ExpertModules, GammaMoEMethod  # noqa: E402
from gamma_vllm.shards import CheckpointModule  # noqa: E402

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, GROUP = 2048, 768, 16, 8, 128
SEED, REPEATS = 0, 9
TOKENS = {1: 20, 8: 5, 64: 2}
"""Tokens at a time -> runs a repeat."""

KINDS = {
    "all at 3 bits": lambda expert, part: 3,
    "all at 4 bits": lambda expert, part: 4,
    "all at 5 bits": lambda expert, part: 5,
    "w13 and w2 differ": lambda expert, part: 5 if part == "down" else 4,
    "experts differ": lambda expert, part: (3, 4, 5, 4)[expert % 4],
    "gate and up differ": lambda expert, part: {"gate": 3, "up": 5, "down": 4}[part],
}
SHARES = {
    "w13 and w2 differ": (0, 2 / 3, 1 / 3),
    "experts differ": (1 / 4, 1 / 2, 1 / 4),
    "gate and up differ": (1 / 3, 1 / 3, 1 / 3),
}
"""Kind -> the shares of its weights at 3, 4 and 5 bits: what it would take if every weight took what it takes alone."""

SHARD_IDS = {"gate": "w1", "up": "w3", "down": "w2"}


def make_layer(width) -> nn.Module:
    """A layer as vLLM makes it, with random codes; `width(expert, part)` are its bits."""
    layer = nn.Module()
    layer.layer_name, layer.activation = "experts", MoEActivation.SILU
    layer.apply_router_weight_on_input, layer.expert_map = False, None
    layer.swiglu_limit = layer.swiglu_alpha = layer.swiglu_beta = None
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda expert: expert)
    layer.moe_config = SimpleNamespace(
        has_bias=False, is_act_and_mul=True, tp_rank=0, tp_size=1,
        activation_situ_beta=None, activation_situ_linear_beta=None,
    )  # fmt: skip

    def module(expert: int, part: str) -> CheckpointModule:
        shape = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
        form = ModuleFormat(shape=shape, num_bits=width(expert, part), group_size=GROUP, symmetric=True)
        return CheckpointModule(f"experts.{expert}.{part}_proj", form)

    experts = [{part: module(i, part) for part in SHARD_IDS} for i in range(EXPERTS)]
    joined = [ExpertModules((e["gate"], e["up"]), e["down"]) for e in experts]
    layer.quant_method = GammaMoEMethod(layer, joined, "BF16")
    layer.quant_method.create_weights(layer, EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16)
    for i, expert in enumerate(experts):
        for part, of in expert.items():
            for tensor in module_tensors("", of.format, "BF16"):
                name = tensor.name[1:]
                if name == "weight_packed":
                    content = torch.randint(-(1 << 31), 1 << 31, tensor.shape).to(torch.int32)
                else:
                    content = torch.tensor(of.format.shape) if name == "weight_shape" else torch.rand(tensor.shape) / 64
                target = getattr(layer, f"{'w2' if part == 'down' else 'w13'}_{name}")
                target.weight_loader(target, content, weight_name="", shard_id=SHARD_IDS[part], expert_id=i)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def measure(layers: dict[str, nn.Module], tokens: int, runs: int) -> dict[str, float]:
    """CPU microseconds of one pass, by kind."""
    x = torch.randn(tokens, HIDDEN).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    shares = torch.rand(tokens, TOP_K)
    best = dict.fromkeys(layers, float("inf"))
    for _ in range(REPEATS):
        for kind, layer in layers.items():
            start = time.process_time()
            for _ in range(runs):
                layer.quant_method.multiply(layer, x, shares, ids)
            best[kind] = min(best[kind], (time.process_time() - start) / runs * 1e6)
    return best


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel()
        layers = {kind: make_layer(width) for kind, width in KINDS.items()}
        rows = []
        for tokens, runs in TOKENS.items():
            microseconds = measure(layers, tokens, runs)
            alone = [microseconds[f"all at {bits} bits"] for bits in (3, 4, 5)]
            for kind, value in microseconds.items():
                row = {"tokens": tokens, "kind": kind, "cpu_microseconds": round(value)}
                if kind in SHARES:
                    expected = sum(share * of_one for share, of_one in zip(SHARES[kind], alone, strict=True))
                    row["over_uniform"] = round(value / expected, 3)
                rows.append(row)
                print(row)
    claims = []
    for kind in SHARES:
        worst = max(row["over_uniform"] for row in rows if row["kind"] == kind)
        text = f"time of a layer where {kind}, over that of uniform layers in the same shares, at worst"
        claims.append(claim(text, worst, "<= 1.1", worst <= 1.1))
    print(f"written: {write_result('experts', 'make bench-experts', [SEED], rows, claims).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
