"""Scores that are drawn, not learned, for programs of the shapes of published models. Benchmarks use them too."""

import math
import random
from collections.abc import Callable, Iterator

from allocator.contract.bank import ModelReference
from allocator.contract.layout import WIDTHS, ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores

__all__ = ["SENSITIVITIES", "Shapes", "draw_scores", "qwen3_30b_a3b", "qwen3_32b"]

Shapes = Iterator[tuple[str, tuple[int, int]]]


def qwen3_32b() -> Shapes:
    """64 blocks of 7 modules, embedding and lm_head: 450 modules."""
    yield "model.embed_tokens", (151936, 5120)
    for block in range(64):
        head = f"model.layers.{block}"
        yield f"{head}.self_attn.q_proj", (8192, 5120)
        yield f"{head}.self_attn.k_proj", (1024, 5120)
        yield f"{head}.self_attn.v_proj", (1024, 5120)
        yield f"{head}.self_attn.o_proj", (5120, 8192)
        yield f"{head}.mlp.gate_proj", (25600, 5120)
        yield f"{head}.mlp.up_proj", (25600, 5120)
        yield f"{head}.mlp.down_proj", (5120, 25600)
    yield "lm_head", (151936, 5120)


def qwen3_30b_a3b() -> Shapes:
    """48 blocks of 4 attention modules and 128 experts of 3, embedding and lm_head: 18 626 modules."""
    yield "model.embed_tokens", (151936, 2048)
    for block in range(48):
        head = f"model.layers.{block}"
        yield f"{head}.self_attn.q_proj", (4096, 2048)
        yield f"{head}.self_attn.k_proj", (512, 2048)
        yield f"{head}.self_attn.v_proj", (512, 2048)
        yield f"{head}.self_attn.o_proj", (2048, 4096)
        for expert in range(128):
            yield f"{head}.mlp.experts.{expert}.gate_proj", (768, 2048)
            yield f"{head}.mlp.experts.{expert}.up_proj", (768, 2048)
            yield f"{head}.mlp.experts.{expert}.down_proj", (2048, 768)
    yield "lm_head", (151936, 2048)


SENSITIVITIES: dict[str, Callable[[random.Random], float]] = {
    "log-normal, sigma 1": lambda draw: math.exp(draw.gauss(0, 1)),
    "log-normal, sigma 2": lambda draw: math.exp(draw.gauss(0, 2)),
    "Pareto, exponent 1.1": lambda draw: draw.paretovariate(1.1),
    "all alike, 1 %": lambda draw: math.exp(draw.gauss(0, 0.01)),
}


def draw_scores(shapes: Shapes, sensitivity: Callable[[random.Random], float], seed: int, noise: float) -> Scores:
    """A module's score at b bits: sensitivity x weights x 4^-b, each candidate with log-normal noise; 0 at 16 bits."""
    draw = random.Random(seed)
    modules = {}
    for name, shape in shapes:
        size = sensitivity(draw) * shape[0] * shape[1] * 1e-9
        candidates = []
        for bits in WIDTHS:
            extra = {} if bits == 16 else {"group_size": 128, "symmetric": False}
            form = ModuleFormat(shape=shape, num_bits=bits, **extra)
            score = 0.0 if bits == 16 else size * 4.0**-bits * math.exp(draw.gauss(0, noise))
            candidates.append(Candidate(format=form, nbytes=module_bytes(form), score=score))
        modules[name] = ScoredModule(candidates=candidates)
    digest = "sha256:" + "0" * 64
    return Scores(
        model=ModelReference(name="drawn", architecture="Qwen3ForCausalLM", digest=digest),
        bank_digest=digest, dtype="BF16", method="drawn", unit="loss", settings={}, other_bytes=10**6, modules=modules,
    )  # fmt: skip
