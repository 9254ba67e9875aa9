"""What vLLM sets aside for LoRA adapters is what a plan says, to the byte: live workers, one rank and two."""

import json
import os

import pytest

torch = pytest.importorskip("torch")

from allocator.model import read_shape  # noqa: E402
from allocator.plan import PlanRequest  # noqa: E402
from allocator.plan.lora import lora_bytes  # noqa: E402
from allocator.plan.schema import LoraRequest  # noqa: E402
from tests.e2e.conftest import mixed_with_vocabulary, succeeded  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CASES = {
    "tied vocabulary": ("qwen3", 1, LoraRequest(max_loras=2, max_lora_rank=16)),
    "fused on disk": ("phi3", 1, LoraRequest(max_lora_rank=8)),
    "some modules, experts not": ("qwen3_moe", 1, LoraRequest(max_lora_rank=8, target_modules=["q_proj", "o_proj"])),
    "two ranks": ("llama", 2, LoraRequest(max_loras=3, max_lora_rank=8)),
}
"""Name -> kind of model, ranks, adapters."""
CASES = {name: case for name, case in CASES.items() if case[1] <= (os.cpu_count() or 1)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, serving, run_engines):
    """Case -> (predicted bytes, bytes counted on each rank); all engines in one process."""
    from tests.e2e.architectures import make_model
    from tests.e2e.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("lora")
    jobs, predicted = [], {}
    for name, (kind, ranks, lora) in CASES.items():
        plain, gamma = folder / kind, folder / f"{kind}-gamma"
        if not plain.exists():
            make_model(kind, plain)
            make_checkpoint(plain, gamma, lambda m: (mixed_with_vocabulary(m)[0], 32, True))
        shape = read_shape(json.loads((plain / "config.json").read_text()))
        predicted[name] = lora_bytes(shape, PlanRequest(tensor_parallel_size=ranks, lora=lora))
        options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "enable_lora": True, "max_loras": lora.max_loras}
        options |= {"max_lora_rank": lora.max_lora_rank, "lora_target_modules": lora.target_modules}
        if ranks > 1:
            options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
        job = {"name": name, "model": str(gamma), "kernel": "torch", "options": options}
        jobs.append(job | {"environment": environment, "steps": [["adapters", {}]]})
    results = run_engines(jobs, folder)
    return lambda case: (predicted[case], succeeded(results[case])[0])


@pytest.mark.parametrize("case", CASES)
def test_buffers_of_adapters_are_predicted_to_the_byte(measured, case):
    predicted, counted = measured(case)
    assert counted == [predicted] * CASES[case][1]
