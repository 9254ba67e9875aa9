"""Examples of answers for the OpenAPI document, made by the code that answers: they cannot grow old."""

import json
from typing import Any

from allocator.contract.bank import ModelReference
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.manifest import Budget, Manifest, Proof
from allocator.model.shape import read_shape
from allocator.plan import PlanRequest, find_gpu, make_plan

__all__ = ["add_examples"]

_SHA = "sha256:"
_MODEL, _BANK, _SCORES = _SHA + "a1" * 32, _SHA + "b2" * 32, _SHA + "c3" * 32
_ALLOCATION, _JOB, _SWEEP = _SHA + "d4" * 32, _SHA + "e5" * 32, _SHA + "f6" * 32
_MOMENT = "2026-01-31T12:00:00Z"
_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


def add_examples(document: dict[str, Any]) -> None:
    """Give every answer of the OpenAPI document that is JSON and a success its example."""
    examples = _examples()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status in ("200", "202"):
                content = operation["responses"].get(status, {}).get("content", {}).get("application/json")
                example = examples.get(f"{method.upper()} {path}")
                if content is not None and example is not None:
                    content["example"] = example


def _examples() -> dict[str, Any]:
    from allocator.report.differences import compare, comparison_document  # loads the solver, which starting must not

    plan = make_plan(read_shape(_CONFIG), find_gpu("rtx4090"), PlanRequest(max_model_len=8192), model="Qwen3-0.6B")
    planned = plan.payload() | {"digest": plan.digest}
    small, large = _manifest(3), _manifest(4)
    manifest = small.payload() | {"digest": small.digest}
    allocation = _allocation(small)
    job = {
        "object": "job", "id": _JOB, "kind": "checkpoint", "state": "running", "manifest_digest": small.digest,
        "step": "writing", "progress": 0.4, "attempt": 1, "tensor_bytes": small.tensor_bytes, "created": _MOMENT,
        "updated": _MOMENT, "checkpoint": None, "error": None,
    }  # fmt: skip
    point = {
        "budget_bytes": small.tensor_bytes, "tensor_bytes": small.tensor_bytes, "average_bits": 3.5,
        "predicted_loss": 0.031, "bound": 0.031,
    }  # fmt: skip
    row = {
        "object": "manifest", "id": small.digest, "model": "Qwen3-0.6B", "model_digest": _MODEL, "bank_digest": _BANK,
        "scores_digest": _SCORES, "method": "gamma", "requested": small.budget.requested, "measured": False,
        "budget_bytes": small.budget.nbytes, "tensor_bytes": small.tensor_bytes,
    }  # fmt: skip
    text = json.dumps(manifest, indent=1) + "\n"
    return {
        "GET /v1/models": _list([_MODEL_ROW]),
        "GET /v1/gpus": _list([_GPU_ROW]),
        "POST /v1/plans": planned,
        "POST /v1/fits": {
            "object": "fit", "plan": planned, "allocation": allocation | {"manifest": text}, "planned": planned,
        },
        "POST /v1/allocations": allocation,
        "GET /v1/allocations": _list([allocation], _ALLOCATION),
        "GET /v1/allocations/{id}": allocation,
        "DELETE /v1/allocations/{id}": {"object": "deleted", "id": _ALLOCATION, "deleted": True},
        "GET /v1/allocations/{id}/manifest": manifest,
        "GET /v1/manifests": _list([row], small.digest),
        "GET /v1/manifests/{id}": manifest,
        "DELETE /v1/manifests/{id}": {"object": "deleted", "id": small.digest, "deleted": True},
        "POST /v1/sweeps": {
            "object": "sweep", "id": _SWEEP, "model": "Qwen3-0.6B", "scores_digest": _SCORES, "unit": "nats",
            "points": [point], "uniform": {"3": point}, "measured": [],
        },
        "POST /v1/diff": comparison_document(compare(small, large)),
        "POST /v1/checkpoints": job | {"state": "queued", "step": "", "progress": 0.0, "attempt": 0},
        "GET /v1/jobs": _list([job], _JOB),
        "GET /v1/jobs/{id}": job,
        "POST /v1/jobs/{id}/cancel": job | {"state": "cancelled"},
        "DELETE /v1/jobs/{id}": {"object": "deleted", "id": _JOB, "deleted": True},
        "GET /v1/node": {
            "object": "node", "state": "off", "message": "", "step": "", "progress": 0.0, "manifest_digest": None,
            "checkpoint": None, "vllm_arguments": None,
        },
        "GET /healthz": {"status": "ok", "message": ""},
        "GET /readyz": {"status": "ok", "message": ""},
        "GET /version": {"name": "gamma", "version": "0.1.0", "api": "v1"},
    }  # fmt: skip


def _manifest(num_bits: int) -> Manifest:
    name = "model.layers.0.mlp.down_proj"
    form = ModuleFormat.model_validate(
        {"shape": (1024, 3072), "num_bits": num_bits, "group_size": 128, "symmetric": False}
    )
    size = module_bytes(form)
    return Manifest(
        model=ModelReference(name="Qwen3-0.6B", architecture="Qwen3ForCausalLM", digest=_MODEL), bank_digest=_BANK,
        scores_digest=_SCORES, method="gamma", dtype="BF16", budget=Budget(requested="2000000 bytes", nbytes=2_000_000),
        tensor_bytes=size + 4096, other_bytes=4096, module_bytes={name: size}, modules={name: form},
        proof=Proof(solver="dynamic", objective=0.031 / num_bits, bound=0.031 / num_bits, gap=0.0),
    )  # fmt: skip


def _allocation(manifest: Manifest) -> dict[str, Any]:
    assert manifest.proof is not None
    return {
        "object": "allocation", "id": _ALLOCATION, "model": "Qwen3-0.6B", "model_digest": _MODEL,
        "scores_digest": _SCORES, "bank_digest": _BANK, "manifest_digest": manifest.digest,
        "request": {
            "model": "Qwen3-0.6B", "budget": "2000000", "pins": {}, "ceilings": {}, "floors": {}, "fusion": "free",
        },
        "requested": manifest.budget.requested, "budget_bytes": manifest.budget.nbytes,
        "tensor_bytes": manifest.tensor_bytes, "average_bits": 3.25, "predicted_loss": manifest.proof.objective,
        "unit": "nats", "proof": manifest.proof.model_dump(),
    }  # fmt: skip


def _list(data: list[Any], following: str | None = None) -> dict[str, Any]:
    return {"object": "list", "data": data} | ({} if following is None else {"next": following})


_MODEL_ROW = {
    "object": "model", "name": "Qwen3-0.6B", "architecture": "Qwen3ForCausalLM", "model_digest": _MODEL,
    "scores_digest": _SCORES, "bank_digest": _BANK, "method": "gamma", "unit": "nats", "quantizer": "gptq",
    "group_size": 128, "symmetric": False, "widths": [2, 3, 4, 5, 6, 8, 16], "modules": 197,
    "feasible_bytes": [176_000_000, 1_192_000_000], "added": _MOMENT,
}  # fmt: skip
_GPU_ROW = {
    "object": "gpu", "name": "NVIDIA L4", "id": "l4", "memory_bytes": 24_152_899_584, "compute_capability": "8.9",
    "segment": "data center", "product_label": "NVIDIA-L4", "mig": [],
}  # fmt: skip
