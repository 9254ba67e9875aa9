"""Scores of Qwen3-32B's shapes with random costs, in a store: enough for everything but checkpoints."""

import math
import random
from pathlib import Path
from typing import Any

from allocator.contract.bank import ModelReference
from allocator.contract.layout import WIDTHS, ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.sidecar.store import Entry, Source, Store

__all__ = ["CONFIG", "publish_scores", "random_scores"]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
    "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": False, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "attention_bias": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
_DIGEST = "sha256:" + "0" * 64
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_FUSED["up_proj"] = "gate_up_proj"


def random_scores(name: str = "Qwen3-32B", seed: int = 0) -> Scores:
    """Costs that fall by about 4 a bit and differ by module and depth, as measured ones do."""
    draw = random.Random(seed)
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q, kv = (CONFIG[key] * CONFIG["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    outside = ScoredModule(candidates=[_candidate((CONFIG["vocab_size"], hidden), 16, 0.0)])
    modules = {"model.embed_tokens": outside}
    for block in range(CONFIG["num_hidden_layers"]):
        for local, shape in shapes.items():
            size = math.exp(draw.gauss(0, 1.5)) * (1 + block / 16)
            losses = {b: 0.0 if b == 16 else size * 4.0**-b * math.exp(draw.gauss(0, 0.2)) for b in WIDTHS}
            part, last = local.split(".")
            group = f"model.layers.{block}.{part}.{_FUSED[last]}" if last in _FUSED else None
            candidates = [_candidate(shape, b, loss) for b, loss in losses.items()]
            modules[f"model.layers.{block}.{local}"] = ScoredModule(fused_group=group, candidates=candidates)
    modules["lm_head"] = outside
    return Scores(
        model=ModelReference(name=name, architecture="Qwen3ForCausalLM", digest=_DIGEST),
        bank_digest=_DIGEST, dtype="BF16", method="random", unit="nats", settings={"seed": seed},
        other_bytes=2 * hidden * (2 * CONFIG["num_hidden_layers"] + 1) + 2 * 2 * 128 * CONFIG["num_hidden_layers"],
        modules=modules,
    )  # fmt: skip


def publish_scores(folder: Path, name: str = "Qwen3-32B") -> Entry:
    """Offer them in the store `folder`."""
    store, scores = Store(str(folder)), random_scores(name)
    store.add_scores(scores)
    entry = Entry(
        name=name, model=scores.model, config=CONFIG, source=Source(kind="hub", location=f"org/{name}"),
        scores_digest=scores.digest, bank_digest=scores.bank_digest, method=scores.method, unit=scores.unit,
        quantizer="gptq", group_size=128, symmetric=False, widths=list(WIDTHS), modules=len(scores.modules),
        feasible_bytes=scores.feasible_bytes(), added="2026-01-01T00:00:00Z",
    )  # fmt: skip
    store.add_entry(entry)
    return entry


def _candidate(shape: tuple[int, int], bits: int, score: float) -> Candidate:
    extra = {} if bits == 16 else {"group_size": 128, "symmetric": False}
    form = ModuleFormat.model_validate({"shape": shape, "num_bits": bits} | extra)
    return Candidate(format=form, nbytes=module_bytes(form), score=score)
