"""Manifests and scores made of nothing but numbers."""

import pytest

from allocator.contract.bank import ModelReference
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.manifest import Budget, Manifest, Proof
from allocator.contract.scores import Candidate, ScoredModule, Scores

DIGESTS = ["sha256:" + letter * 64 for letter in "0123"]


def form(bits: int, shape=(64, 64)) -> ModuleFormat:
    extra = {} if bits == 16 else {"group_size": 32, "symmetric": True}
    return ModuleFormat(shape=shape, num_bits=bits, **extra)


def scores_of(names, model_digest=DIGESTS[0], widths=(2, 3, 4, 8, 16)) -> Scores:
    """Module i at b bits costs (i + 1) * 4^-b."""
    modules = {}
    for i, name in enumerate(names):
        forms = [form(bits) for bits in widths]
        candidates = [Candidate(format=f, nbytes=module_bytes(f), score=(i + 1) * 4.0**-f.num_bits) for f in forms]
        modules[name] = ScoredModule(candidates=candidates)
    model = ModelReference(name="some", architecture="LlamaForCausalLM", digest=model_digest)
    return Scores(
        model=model, bank_digest=DIGESTS[1], dtype="BF16", method="gamma", unit="nats", settings={}, other_bytes=100,
        modules=modules,
    )  # fmt: skip


def manifest_of(widths, model_digest=DIGESTS[0], scores_digest=DIGESTS[2], objective=0.5) -> Manifest:
    """A manifest of {module name: bits}."""
    modules = {name: form(bits) for name, bits in widths.items()}
    sizes = {name: module_bytes(f) for name, f in modules.items()}
    total = 100 + sum(sizes.values())
    return Manifest(
        model=ModelReference(name="some", architecture="LlamaForCausalLM", digest=model_digest),
        bank_digest=DIGESTS[1], scores_digest=scores_digest, method="gamma", dtype="BF16",
        budget=Budget(requested="1MiB", nbytes=1 << 20), tensor_bytes=total, other_bytes=100, module_bytes=sizes,
        modules=modules, proof=Proof(solver="highs", objective=objective, bound=objective, gap=0.0),
    )  # fmt: skip


@pytest.fixture
def make_scores():
    return scores_of


@pytest.fixture
def make_manifest():
    return manifest_of
