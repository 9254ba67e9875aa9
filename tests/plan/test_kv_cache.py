"""KV cache arithmetic against vLLM's own: the layers of its model classes, its groups, blocks, tokens, concurrency."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.model import read_shape
from allocator.model.architectures import known_architectures
from allocator.plan import PlanRequest
from allocator.plan.kv_cache import kv_pools, pools_of, stage_layers
from allocator.plan.weights import module_shapes, residency_of
from tests.configs import shape_of
from tests.plan.cache_families import FAMILIES, attention_of

GIB = 2**30
MODELS = ["llama-3.1-8b", "qwen3-32b", "phi-3-mini-4k", "gemma-3-27b", "deepseek-v2-lite", "mixtral-8x7b"]
BATCHED_TOKENS = 2048
REQUESTS = [(1, 1, "auto", 16), (2, 1, "fp8", 32), (2, 2, "auto", 16)]
"""Ranks, pipeline stages, dtype of keys and values, tokens of a block."""
CASES = [(4096, 51 * GIB + 12345), (3001, 47 * GIB), (32768, 63 * GIB)]
"""Length of a sequence, bytes of the cache."""


def pools(name, **request):
    return kv_pools(shape_of(name), PlanRequest(**request), BATCHED_TOKENS)


@pytest.fixture(scope="module")
def of_vllm(tmp_path_factory):
    """`of_vllm(family, request)`: what vLLM says of each case."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("caches")
    asked = [(family, request) for family in FAMILIES for request in REQUESTS]
    cases = [{"length": length, "memory": memory} for length, memory in CASES]
    names = ("ranks", "stages", "kv_cache_dtype", "block_size")
    jobs = [{"config": FAMILIES[f], "cases": cases} | dict(zip(names, request, strict=True)) for f, request in asked]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_caches.py")
    command = [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"VLLM_PLUGINS": ""}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / "results.json").read_text())
    return dict(zip(asked, results, strict=True)).__getitem__


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_tokens_and_concurrency_are_those_of_vllm(of_vllm, family):
    for request in REQUESTS:
        ranks, stages, dtype, block_size = request
        asked = PlanRequest(
            tensor_parallel_size=ranks, pipeline_parallel_size=stages, kv_cache_dtype=dtype, block_size=block_size
        )
        ours = pools_of(attention_of(FAMILIES[family]), asked, BATCHED_TOKENS)
        real = of_vllm((family, request))
        assert isinstance(real, list), real
        for (length, memory), answer in zip(CASES, real, strict=True):
            assert [pool.bytes_per_block for pool in ours] == answer["bytes_per_block"]
            tightest = max(ours, key=lambda pool: pool.bytes_per_block)
            capacity = tightest.capacity(memory, length)
            assert capacity.num_blocks == answer["num_blocks"]
            assert (capacity.tokens, capacity.concurrency) == pytest.approx((answer["tokens"], answer["concurrency"]))
            for pool, needed, longest in zip(ours, answer["needed"], answer["longest"], strict=True):
                assert pool.bytes_for(1, length) == needed + pool.bytes_per_block  # and the null block
                assert pool.longest(memory, 1, 1 << 20) == longest


SIZED = [
    family
    for family, config in FAMILIES.items()
    if config["architectures"][0] in known_architectures()
    and family != "windows with heads of their own"  # transformers has them twice as many, whatever config.json says
]


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZED)
def test_weights_and_tables_of_positions_are_those_of_vllm(of_vllm, family):
    shape = read_shape(FAMILIES[family])
    language = tuple(other for other in shape.others if not other.name.startswith(shape.beside))
    shape = replace(shape, others=language, beside=())  # towers are not built here
    whole = {name: ModuleFormat(shape=of, num_bits=16) for name, of in module_shapes(shape).items()}
    for request in REQUESTS[:2]:
        ranks = request[0]
        real = of_vllm((family, request))
        assert isinstance(real, list), real
        assert shape.position_bytes == real[0]["tables"]
        asked = PlanRequest(tensor_parallel_size=ranks, kernel="torch")
        if family == "Mamba 2" and ranks > 1:
            with pytest.raises(InputError, match="does not divide the 1 groups of the Mamba layers"):
                residency_of(shape, asked)
            continue
        (predicted,) = residency_of(shape, asked).stage_bytes(whole)
        # the copy of kv_b_proj is made after loading
        copies = sum(f.shape[0] * f.shape[1] * 2 // ranks for name, f in whole.items() if name.endswith("kv_b_proj"))
        assert predicted - copies == real[0]["weights"]


def test_page_of_grouped_attention_holds_keys_and_values_of_the_ranks_heads():
    assert pools("qwen3-32b")[0].bytes_per_block == 64 * 16 * 8 * 2 * 128 * 2
    assert pools("qwen3-32b", tensor_parallel_size=4, kv_cache_dtype="fp8")[0].bytes_per_block == 64 * 16 * 2 * 2 * 128
    assert (
        pools("qwen3-32b", tensor_parallel_size=16)[0].bytes_per_block == 64 * 16 * 1 * 2 * 128 * 2
    )  # heads are replicated


def test_latent_attention_keeps_one_vector_on_every_rank():
    assert pools("deepseek-v2-lite", tensor_parallel_size=4)[0].bytes_per_block == 27 * 16 * (512 + 64) * 2


def test_sliding_windows_cap_what_long_sequences_need():
    (pool,) = pools("gemma-3-27b")
    assert {group.window for group in pool.groups} == {None, 1024}
    full, window = 131072 // 16, -(-(1024 - 1 + 2 * BATCHED_TOKENS) // 16) + 1
    count = sum(group.window is not None for group in pool.groups)
    assert pool.blocks_per_sequence(131072) == full + count * window


def test_states_do_not_grow_with_the_sequence_and_fill_pages_of_keys_and_values():
    (pool,) = pools("qwen3-next-80b-a3b")
    state = 3 * 8192 * 2 + 32 * 128 * 128 * 2
    tokens = -(-state // (16 * 2 * 2 * 256 * 2)) * 16
    assert pool.bytes_per_block == 12 * tokens * 2 * 2 * 256 * 2
    assert pool.state_bytes(5) == 5 * 3 * 2 * pool.bytes_per_block  # three groups of layers, each keeps it twice
    assert pool.blocks_per_sequence(100 * tokens) - pool.blocks_per_sequence(tokens) == 99
    (halved,) = pools("qwen3-next-80b-a3b", tensor_parallel_size=2)
    assert halved.bytes_per_block * 2 == pool.bytes_per_block


@pytest.mark.parametrize(("blocks", "stages", "counts"), [(62, 4, [15, 16, 16, 15]), (36, 3, [12, 12, 12])])
def test_pipeline_stages_divide_the_blocks_as_vllm_does(blocks, stages, counts):
    assert [len(stage) for stage in stage_layers(blocks, stages)] == counts


@pytest.mark.parametrize("name", MODELS)
def test_what_sequences_need_is_exactly_what_they_get(name):
    for pool in pools(name, pipeline_parallel_size=2):
        needed = pool.bytes_for(5, 4000)
        assert pool.sequences(needed, 4000) == 5
        assert pool.sequences(needed - 1, 4000) == 4
        assert pool.longest(needed, 5, 40_000) >= 4000
        assert pool.longest(pool.bytes_per_block - 1, 1, 40_000) == 0
