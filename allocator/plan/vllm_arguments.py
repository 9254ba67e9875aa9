"""What vLLM must be told so that a plan holds: arguments of `vllm serve`, and the file for its `--config`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from allocator.contract.documents import write_atomically
from allocator.contract.errors import InputError
from allocator.plan.schema import Plan

__all__ = [
    "PLANNED_OPTIONS",
    "VLLM_CONFIG_NAME",
    "check_arguments",
    "serving_options",
    "vllm_arguments",
    "write_vllm_config",
]

VLLM_CONFIG_NAME = "vllm.yaml"

PLANNED_OPTIONS = (
    "block-size",
    "config",
    "enable-expert-parallel",
    "enable-lora",
    "gpu-memory-utilization",
    "kv-cache-dtype",
    "kv-cache-memory-bytes",
    "lora-target-modules",
    "max-lora-rank",
    "max-loras",
    "max-model-len",
    "max-num-batched-tokens",
    "max-num-seqs",
    "model",
    "num-gpu-blocks-override",
    "pipeline-parallel-size",
    "quantization",
    "served-model-name",
    "tensor-parallel-size",
)
"""Options of `vllm serve` that a plan and its checkpoint decide; others may be added to what is served."""
_SHORT = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "ep": "enable-expert-parallel"}
_SHORT |= {"q": "quantization"}

Option = str | int | float | bool | list[str]

_BFLOAT16_CAPABILITY = (8, 0)


def serving_options(plan: Plan) -> dict[str, Option]:
    """Options of `vllm serve` by name, all that the plan rests on."""
    request = plan.request
    assert request.max_model_len is not None
    options: dict[str, Option] = {
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
    if request.lora is not None:
        options |= {"enable-lora": True, "max-loras": request.lora.max_loras}
        options["max-lora-rank"] = request.lora.max_lora_rank
        if request.lora.target_modules is not None:
            options["lora-target-modules"] = list(request.lora.target_modules)
    capability = plan.device.compute_capability
    if capability is not None and tuple(map(int, capability.split("."))) < _BFLOAT16_CAPABILITY:
        options["dtype"] = "float16"  # kernels for bfloat16 begin with Ampere
    return options


def check_arguments(arguments: Sequence[str], planned: Mapping[str, Option]) -> None:
    """Refuse further `arguments` for `vllm serve` that say otherwise than `planned` (options by name).

    Raises InputError naming the option, and what was planned.
    """
    for number, argument in enumerate(arguments):
        if not argument.startswith("-"):
            continue
        head, _, value = argument.partition("=")
        name = head.lstrip("-").replace("_", "-")
        name = _SHORT.get(name, name) if not head.startswith("--") else name
        if name not in PLANNED_OPTIONS:
            continue
        if not value and number + 1 < len(arguments) and not arguments[number + 1].startswith("-"):
            value = arguments[number + 1]
        if value and name in planned and value == str(planned[name]):
            continue
        has = f"has {name} {planned[name]}" if name in planned else f"has no {name}"
        raise InputError(
            f"argument {argument!r} for vllm contradicts the plan, which {has}: memory was shared out without it. Say "
            "it to `gamma prepare`, which plans it, or leave it out"
        )


def vllm_arguments(plan: Plan, checkpoint: str) -> list[str]:
    """The command line `vllm serve CHECKPOINT ...` under which the plan holds, word by word."""
    words = ["vllm", "serve", checkpoint]
    for name, value in serving_options(plan).items():
        words.append(f"--{name}")
        if value is not True:
            words += value if isinstance(value, list) else [str(value)]
    return words


def write_vllm_config(plan: Plan, checkpoint: Path) -> Path:
    """Write `vllm.yaml` into the checkpoint folder, for `vllm serve --config`. Its `model` is the folder as given."""
    options = {"model": str(checkpoint)} | serving_options(plan)
    path = checkpoint / VLLM_CONFIG_NAME
    write_atomically(path, "".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    return path
