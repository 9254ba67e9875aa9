"""The memory model against what vLLM really took: public measurements on an H100."""

import json
from pathlib import Path

import pytest

from allocator.plan import PlanRequest, find_gpu, make_plan
from allocator.plan.kv_cache import kv_pools
from allocator.plan.overheads import capture_sizes
from tests.configs import shape_of

GIB = 2**30
MEASURED = json.loads((Path(__file__).parents[1] / "fixtures" / "vllm_memory.json").read_text())["rows"]
"""Facts read from the logs of llm-d planner's runs of vLLM 0.19 on an H100 (1024 sequences, 8192 batched tokens)."""


def plan_of(row):
    request = PlanRequest(
        max_model_len=8192,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        tensor_parallel_size=row["tensor_parallel_size"],
        gpu_memory_utilization=0.95,
    )
    return make_plan(shape_of(row["model"]), find_gpu("h100"), request)


@pytest.mark.parametrize("row", MEASURED, ids=lambda r: f"{r['model']}-tp{r['tensor_parallel_size']}")
def test_overheads_are_near_what_was_measured_and_not_below(row):
    plan = plan_of(row)
    activations = plan.line("activations").nbytes / GIB
    assert row["activation_gib"] * 0.98 < activations < row["activation_gib"] * 1.15
    assert row["non_torch_gib"] * 0.95 < plan.line("non-torch").nbytes / GIB < row["non_torch_gib"] * 1.1
    graphs = plan.line("cuda graphs").nbytes / GIB
    # In one run the estimate of vLLM itself was twice what it took later.
    assert min(row["graphs_gib"], row["graphs_taken_gib"]) * 0.9 < graphs < row["graphs_gib"] * 1.6


@pytest.mark.parametrize("row", [r for r in MEASURED if r["weights_16_bit"]], ids=lambda r: r["model"])
def test_weights_at_16_bits_and_position_tables_are_what_was_loaded(row):
    plan = plan_of(row)
    loaded = plan.uniform[-1].nbytes + plan.line("position tables").nbytes
    assert loaded / GIB < row["weights_gib"] + 0.01
    assert row["weights_gib"] < (loaded + plan.line("slack").nbytes) / GIB + 0.01


@pytest.mark.parametrize("row", [r for r in MEASURED if "tokens" in r], ids=lambda r: r["model"])
def test_tokens_of_the_cache_follow_from_its_bytes(row):
    request = PlanRequest(tensor_parallel_size=row["tensor_parallel_size"])
    (pool,) = kv_pools(shape_of(row["model"]), request, 8192)
    tokens = pool.capacity(int(row["kv_gib"] * GIB), 8192).tokens
    assert tokens == pytest.approx(row["tokens"], rel=2e-3)


def test_graphs_are_captured_for_the_sizes_that_vllm_captures():
    assert capture_sizes(4, 2048) == [1, 2, 4, 8]
    assert capture_sizes(5, 2048) == [1, 2, 4, 5, 8]
    assert len(capture_sizes(1024, 8192)) == 51
    assert capture_sizes(1024, 8192)[-1] == 512
    assert capture_sizes(1024, 8192, is_blackwell=True)[-1] == 1024
