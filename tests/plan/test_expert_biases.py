"""What gpt-oss has beside its weights lies on the ranks as vLLM cuts it: sinks with their heads, biases of experts with
the rows of gate and up, or with their experts."""

import pytest

from allocator.model import read_shape
from allocator.plan import PlanRequest
from allocator.plan.weights import residency_of

EXPERTS, HIDDEN, SIZE, BLOCKS = 4, 128, 64, 2
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": SIZE, "vocab_size": 256,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
GATE_UP, DOWN = (2 * BLOCKS * EXPERTS * rows for rows in (2 * SIZE, HIDDEN))
"""Bytes of all biases, at 16 bits."""
SINKS = 2 * BLOCKS * 4


@pytest.mark.parametrize(
    ("request_", "saved"),
    [
        (PlanRequest(tensor_parallel_size=2), (GATE_UP + SINKS) // 2),
        (PlanRequest(tensor_parallel_size=2, expert_parallel=True), (GATE_UP + DOWN + SINKS) // 2),
    ],
    ids=["tensor parallel", "expert parallel"],
)
def test_a_rank_holds_its_share(request_, saved):
    alone, on_two = (
        residency_of(read_shape(GPT_OSS), request).stages[0].other_bytes for request in (PlanRequest(), request_)
    )
    assert alone - on_two == saved
