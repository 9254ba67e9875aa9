"""Layers of vLLM without an engine: tensor parallelism is simulated by telling each layer its rank."""

import pytest


@pytest.fixture
def parallel(monkeypatch):
    """Set the tensor-parallel rank and size that layers made from now on believe in."""
    linear = pytest.importorskip("vllm.model_executor.layers.linear")
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import vocab_parallel_embedding

    def become(rank: int, size: int) -> None:
        for module in (linear, parameter, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    become(0, 1)
    return become
