"""Scores made of nothing but numbers."""

import math
import random
from collections.abc import Callable, Mapping

import pytest

from allocator.contract.bank import ModelReference
from allocator.contract.layout import WIDTHS, ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores

DIGEST = "sha256:" + "0" * 64

Given = Mapping[str, tuple[tuple[int, int], Mapping[int, float]]]


def build_scores(modules: Given, other_bytes: int = 0, groups: Mapping[str, str] | None = None) -> Scores:
    scored = {}
    for name, (shape, by_width) in modules.items():
        candidates = []
        for bits, score in by_width.items():
            extra = {} if bits == 16 else {"group_size": 32, "symmetric": True}
            form = ModuleFormat(shape=shape, num_bits=bits, **extra)
            candidates.append(Candidate(format=form, nbytes=module_bytes(form), score=score))
        scored[name] = ScoredModule(fused_group=(groups or {}).get(name), candidates=candidates)
    return Scores(
        model=ModelReference(name="random", architecture="LlamaForCausalLM", digest=DIGEST),
        bank_digest=DIGEST,
        dtype="BF16",
        method="measured",
        unit="loss",
        settings={},
        other_bytes=other_bytes,
        modules=scored,
    )


@pytest.fixture
def make_scores() -> Callable[..., Scores]:
    """make_scores({name: (shape, {width: score})}, other_bytes, {name: fused group})."""
    return build_scores


@pytest.fixture
def make_large() -> Callable[..., Scores]:
    """make_large(modules, scale): scores like measured ones, of modules with real shapes."""

    def make(count: int, scale: float = 1.0, seed: int = 0) -> Scores:
        draw = random.Random(seed)
        modules = {}
        for i in range(count):
            shape = (draw.choice((1024, 4096, 14336)), draw.choice((4096, 14336)))
            size = math.exp(draw.gauss(0, 2))
            losses = {b: scale * size * 4.0**-b * math.exp(draw.gauss(0, 0.3)) for b in WIDTHS if b != 16}
            modules[f"model.layers.{i // 7}.m{i % 7}"] = (shape, losses | {16: 0.0})
        return build_scores(modules, 1000)

    return make
