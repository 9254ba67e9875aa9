"""What vLLM must be told so that a plan holds: arguments of `vllm serve`, and the file for its `--config`."""

import json
from pathlib import Path

from allocator.contract.documents import write_atomically
from allocator.fitting.document import Plan

__all__ = ["VLLM_CONFIG_NAME", "serving_options", "vllm_arguments", "write_vllm_config"]

VLLM_CONFIG_NAME = "vllm.yaml"

_BFLOAT16_CAPABILITY = (8, 0)


def serving_options(plan: Plan) -> dict[str, str | int | float | bool]:
    """Options of `vllm serve` by name, all that the plan rests on."""
    request = plan.request
    assert request.max_model_len is not None
    options: dict[str, str | int | float | bool] = {
        "max-model-len": request.max_model_len,
        "max-num-seqs": request.max_num_seqs,
        "max-num-batched-tokens": plan.batched_tokens,
        "gpu-memory-utilization": request.gpu_memory_utilization,
    }
    if request.kv_cache_dtype != "auto":
        options["kv-cache-dtype"] = request.kv_cache_dtype
    if request.tensor_parallel_size > 1:
        options["tensor-parallel-size"] = request.tensor_parallel_size
    if request.pipeline_parallel_size > 1:
        options["pipeline-parallel-size"] = request.pipeline_parallel_size
    if request.expert_parallel:
        options["enable-expert-parallel"] = True
    if request.block_size != 16:
        options["block-size"] = request.block_size
    if request.enforce_eager:
        options["enforce-eager"] = True
    capability = plan.device.compute_capability
    if capability is not None and tuple(map(int, capability.split("."))) < _BFLOAT16_CAPABILITY:
        options["dtype"] = "float16"  # kernels for bfloat16 begin with Ampere
    return options


def vllm_arguments(plan: Plan, checkpoint: str) -> list[str]:
    """The command line `vllm serve CHECKPOINT ...` under which the plan holds, word by word."""
    words = ["vllm", "serve", checkpoint]
    for name, value in serving_options(plan).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def write_vllm_config(plan: Plan, checkpoint: Path) -> Path:
    """Write `vllm.yaml` into the checkpoint folder, for `vllm serve --config`. Its `model` is the folder as given."""
    options = {"model": str(checkpoint)} | serving_options(plan)
    path = checkpoint / VLLM_CONFIG_NAME
    write_atomically(path, "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    return path
