"""One small document of each kind, and a checkpoint folder, all belonging together."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allocator.contract.bank import Bank, BankModule, ModelReference
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.layout import ModuleFormat, module_bytes, module_tensors
from allocator.contract.manifest import MANIFEST_NAME, Budget, Manifest, Proof
from allocator.contract.scores import Candidate, ScoredModule, Scores

SHAPE = (16, 64)
QUERY = "model.layers.0.self_attn.q_proj"
HEAD = "lm_head"
NORM_BYTES = 128
TORCH_DTYPES = {"I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16}


def digest_of(letter: str) -> str:
    return "sha256:" + letter * 64


def quantized(num_bits: int) -> ModuleFormat:
    return ModuleFormat(shape=SHAPE, num_bits=num_bits, group_size=32, symmetric=True)


FULL = ModuleFormat(shape=SHAPE, num_bits=16)
MODEL = ModelReference(name="tiny", architecture="LlamaForCausalLM", digest=digest_of("a"))


@pytest.fixture
def bank() -> Bank:
    module = BankModule(file="q.safetensors", file_digest=digest_of("b"), candidates=[quantized(2), quantized(4)])
    return Bank(model=MODEL, dtype="BF16", quantizer="rtn", group_size=32, symmetric=True, modules={QUERY: module})


@pytest.fixture
def scores(bank: Bank) -> Scores:
    candidates = [
        Candidate(format=form, nbytes=module_bytes(form), score=score)
        for form, score in ((quantized(2), 2.0), (quantized(4), 0.5), (FULL, 0.0))
    ]
    return Scores(
        model=MODEL,
        bank_digest=bank.digest,
        dtype="BF16",
        method="measured",
        unit="squared error",
        settings={"samples": 4},
        other_bytes=NORM_BYTES,
        modules={
            QUERY: ScoredModule(fused_group="model.layers.0.self_attn.qkv_proj", candidates=candidates),
            HEAD: ScoredModule(candidates=candidates[-1:]),
        },
    )


@pytest.fixture
def manifest(scores: Scores) -> Manifest:
    modules = {QUERY: quantized(4), HEAD: FULL}
    sizes = {name: module_bytes(form) for name, form in modules.items()}
    return Manifest(
        model=MODEL,
        bank_digest=scores.bank_digest,
        scores_digest=scores.digest,
        method="measured",
        dtype="BF16",
        budget=Budget(requested="4KiB", nbytes=4096),
        tensor_bytes=NORM_BYTES + sum(sizes.values()),
        other_bytes=NORM_BYTES,
        module_bytes=sizes,
        modules=modules,
        proof=Proof(solver="highs", objective=0.5, bound=0.5, gap=0.0),
    )


@pytest.fixture
def checkpoint(manifest: Manifest, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    manifest.write(folder / MANIFEST_NAME)
    quantization = CheckpointConfig.of_manifest(manifest).model_dump(mode="json", exclude_none=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    tensors = {"model.norm.weight": torch.ones(NORM_BYTES // 2, dtype=torch.bfloat16)}
    for name, form in manifest.modules.items():
        for spec in module_tensors(name, form, "BF16"):
            tensors[spec.name] = torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
