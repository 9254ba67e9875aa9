"""KV cache arithmetic against vLLM's own classes: pages, groups, blocks, tokens, concurrency."""

import pytest

from allocator.plan import PlanRequest
from allocator.plan.kv_cache import kv_pools, stage_layers
from tests.configs import shape_of

GIB = 2**30
MODELS = ["llama-3.1-8b", "qwen3-32b", "phi-3-mini-4k", "gemma-3-27b", "deepseek-v2-lite", "mixtral-8x7b"]
BATCHED_TOKENS = 2048


def pools(name, **request):
    return kv_pools(shape_of(name), PlanRequest(**request), BATCHED_TOKENS)


@pytest.fixture(scope="module")
def vllm_config():
    """A bare configuration of vLLM with what the KV cache code reads; `max_model_len` is set by each test."""
    pytest.importorskip("vllm")
    from types import SimpleNamespace

    from vllm.config import VllmConfig

    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=1, original_max_model_len=1)
    config.scheduler_config.max_num_batched_tokens = BATCHED_TOKENS
    config.scheduler_config.async_scheduling = True  # as on CUDA: one batch more in flight
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def specs_of(name, request, dtypes):
    """What vLLM's attention layers of `name` would say on one rank (`Attention.get_kv_cache_spec`)."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    specs = {}
    for index, layer in enumerate(shape_of(name).attention):
        common = {"block_size": request.block_size, "dtype": dtypes[request.kv_element_bytes]}
        if layer.kind == "mla":
            spec = MLAAttentionSpec(num_kv_heads=1, head_size=layer.key_size, **common)
        else:
            common |= {
                "num_kv_heads": max(1, layer.kv_heads // request.tensor_parallel_size),
                "head_size": layer.key_size,
            }
            if layer.window is None:
                spec = FullAttentionSpec(**common)
            else:
                spec = SlidingWindowSpec(sliding_window=layer.window, **common)
        specs[f"layers.{index}"] = spec
    return specs


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["LBNHC", "BLHNC"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_tokens_and_concurrency_are_those_of_vllm(vllm_config, name, layout):
    import torch
    from vllm.v1.core.kv_cache_utils import (
        _estimate_max_model_len_from_groups,
        _max_memory_usage_bytes_from_groups,
        _pool_bytes_per_block,
        get_kv_cache_capacity,
        get_kv_cache_configs,
    )

    dtypes = {1: torch.float8_e4m3fn, 2: torch.bfloat16}
    vllm_config.cache_config.kv_cache_layout = layout
    assert vllm_config.max_in_flight_tokens == 2 * BATCHED_TOKENS
    for size, dtype, block_size in [(1, "auto", 16), (2, "fp8", 16), (4, "auto", 32), (16, "fp8", 64)]:
        request = PlanRequest(tensor_parallel_size=size, kv_cache_dtype=dtype, block_size=block_size)
        (pool,) = kv_pools(shape_of(name), request, BATCHED_TOKENS)
        for length, memory in [(4096, 11 * GIB + 12345), (3001, 7 * GIB), (32768, 23 * GIB)]:
            config = vllm_config.model_config
            config.max_model_len = config.original_max_model_len = length
            (real,) = get_kv_cache_configs(vllm_config, [specs_of(name, request, dtypes)], [memory])
            groups = real.kv_cache_groups
            ours = pool.capacity(memory, length)
            assert pool.bytes_per_block == _pool_bytes_per_block(vllm_config, groups)
            assert ours.num_blocks == real.num_blocks
            assert (ours.tokens, ours.concurrency) == pytest.approx(get_kv_cache_capacity(vllm_config, real))
            needed = _max_memory_usage_bytes_from_groups(vllm_config, groups)
            assert pool.bytes_for(1, length) == needed + pool.bytes_per_block  # and the null block
            config.max_model_len = 1 << 20
            available = memory - pool.bytes_per_block  # vLLM keeps the null block back before it asks
            longest = _estimate_max_model_len_from_groups(vllm_config, groups, available)
            assert pool.longest(memory, 1, 1 << 20) == longest


def test_page_of_grouped_attention_holds_keys_and_values_of_the_ranks_heads():
    assert pools("qwen3-32b")[0].page_bytes == 16 * 8 * 2 * 128 * 2
    assert pools("qwen3-32b", tensor_parallel_size=4, kv_cache_dtype="fp8")[0].page_bytes == 16 * 2 * 2 * 128
    assert pools("qwen3-32b", tensor_parallel_size=16)[0].page_bytes == 16 * 1 * 2 * 128 * 2  # heads are replicated


def test_latent_attention_keeps_one_vector_on_every_rank():
    assert pools("deepseek-v2-lite", tensor_parallel_size=4)[0].page_bytes == 16 * (512 + 64) * 2


def test_sliding_windows_cap_what_long_sequences_need():
    (pool,) = pools("gemma-3-27b")
    assert {group.window for group in pool.groups} == {None, 1024}
    full, window = 131072 // 16, -(-(1024 - 1 + 2 * BATCHED_TOKENS) // 16) + 1
    count = sum(group.window is not None for group in pool.groups)
    assert pool.blocks_per_sequence(131072) == full + count * window


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
