# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""What is done to tensors on their way into a model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from types import SimpleNamespace

from allocator.contract.packing import dequantize
from gamma_vllm.weight_stream import turn_zero_points
from tests.gamma_vllm.layers import declare, stored_tensors

HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.mark.parametrize("leaf", HEADS)
def test_zero_points_follow_the_rows_that_vllm_turns_for_llama_4(leaf):
    llama4 = pytest.importorskip("vllm.model_executor.models.llama4")
    turned = llama4.Llama4ForCausalLM.permute_qk_weight_for_rotary
    model = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4, num_key_value_heads=2))
    name, form = f"a.{leaf}", declare(64, 128, 3, 32, False)
    tensors, weight = stored_tensors(form, 0)
    stream = [turned(model, f"{name}.{part}", tensor) for part, tensor in tensors.items()]
    found = {key.removeprefix(f"{name}."): tensor for key, tensor in turn_zero_points({name: form}, HEADS, stream)}
    assert found.keys() == tensors.keys()
    given = dequantize(found["weight_packed"], found["weight_scale"], found["weight_zero_point"], 3)
    assert torch.equal(given, turned(model, f"{name}.weight", weight)[1])
    other = [("b.q_proj.weight_zero_point", tensors["weight_zero_point"])]
    assert list(turn_zero_points({name: form}, HEADS, other)) == other  # of a part that is not quantized here
