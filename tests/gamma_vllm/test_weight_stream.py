# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""What is done to tensors on their way into a model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from types import SimpleNamespace

from allocator.contract.packing import dequantize
from gamma_vllm.shards import CheckpointModule
from gamma_vllm.weight_stream import turn_candidates, turn_zero_points, with_weight
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
    untouched = [(f"{name}.{part}", tensor) for part, tensor in tensors.items()]  # as a bank has them
    for key, tensor in turn_zero_points({name: form}, HEADS, turn_candidates({name: form}, HEADS, untouched)):
        assert torch.equal(tensor, found[key.removeprefix(f"{name}.")])
    other = [("b.q_proj.weight_zero_point", tensors["weight_zero_point"])]
    assert list(turn_zero_points({name: form}, HEADS, other)) == other  # of a part that is not quantized here


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_head_that_vllm_reads_rows_of_comes_dequantized(symmetric):
    form = declare(64, 128, 3, 32, symmetric)
    tensors, weight = stored_tensors(form, 0)
    stored = [("norm.weight", torch.ones(2)), *((f"lm_head.{part}", tensor) for part, tensor in tensors.items())]
    instead = dict(with_weight(CheckpointModule("lm_head", form), True, stored))
    assert instead.keys() == {"norm.weight", "lm_head.weight"}
    assert torch.equal(instead["lm_head.weight"], weight)
    beside = dict(with_weight(CheckpointModule("lm_head", form), False, stored))
    assert beside.keys() == {*dict(stored), "lm_head.weight"}
