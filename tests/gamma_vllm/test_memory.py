"""Weights share mappings with huge pages, and nothing else."""

import gc

import pytest
import torch

from gamma_vllm import memory
from gamma_vllm.memory import empty_weight


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory, "_mappings", [])


def test_tensors_lie_side_by_side_and_do_not_overlap():
    tensors = [
        empty_weight("weight_packed", n, dtype)
        for n, dtype in ((5000, torch.int32), (4099, torch.bfloat16), (9000, torch.uint8))
    ]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [float(t.double().sum()) for t in tensors] == [0, 4099, 18000]
    places = [t.data_ptr() for t in tensors]
    assert places == [places[0], places[0] + 20032, places[0] + 20032 + 8256]
    assert all(place % 64 == 0 for place in places)


def test_each_part_is_a_stream_of_its_own():
    codes, scale, more = (empty_weight(part, 4096, torch.uint8) for part in ("packed", "scale", "packed"))
    assert more.data_ptr() == codes.data_ptr() + 4096
    assert abs(scale.data_ptr() - codes.data_ptr()) >= memory._MAPPING


def test_each_tensor_has_a_storage_of_its_own():
    """safetensors refuses to save tensors that share one."""
    first, second = empty_weight("weight_packed", 5000, torch.int32), empty_weight("weight_packed", 5000, torch.int32)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == 20000


def test_a_tensor_larger_than_a_mapping_has_room(monkeypatch):
    monkeypatch.setattr(memory, "_MAPPING", 1 << 21)
    large, small = empty_weight("weight_packed", 3 << 20, torch.uint8), empty_weight("weight_packed", 4096, torch.uint8)
    large.fill_(1), small.fill_(2)
    assert small.data_ptr() == large.data_ptr() + (3 << 20)  # in what was left of the last page
    assert int(large.sum(dtype=torch.int64)) == 3 << 20


def test_memory_goes_with_its_last_tensor():
    first, second = empty_weight("weight_packed", 5000, torch.int32), empty_weight("weight_packed", 5000, torch.int32)
    (mapping,) = memory._mappings
    del first
    gc.collect()
    assert mapping() is not None
    del second
    gc.collect()
    assert mapping() is None


def test_meta_tensors_stay_meta():
    with torch.device("meta"):
        assert empty_weight("weight_packed", 5000, torch.int32).is_meta
