"""Weights share mappings with huge pages, and nothing else."""

import gc
from pathlib import Path

import pytest
import torch

from gamma_vllm.memory import MAPPING_BYTES, empty_weight


@pytest.fixture
def part(request):
    """A part of a layer that no other test has, and so a mapping of its own."""
    return f"part of {request.node.name}"


def is_mapped(address):
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(first <= address < last for first, last in ranges)


def test_tensors_lie_side_by_side_and_do_not_overlap(part):
    tensors = [
        empty_weight(part, n, dtype) for n, dtype in ((5000, torch.int32), (4099, torch.bfloat16), (9000, torch.uint8))
    ]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [float(t.double().sum()) for t in tensors] == [0, 4099, 18000]
    places = [t.data_ptr() for t in tensors]
    assert places == [places[0], places[0] + 20032, places[0] + 20032 + 8256]
    assert all(place % 64 == 0 for place in places)


def test_each_part_is_a_stream_of_its_own(part):
    codes, scale, more = (empty_weight(f"{part}, {of}", 4096, torch.uint8) for of in ("codes", "scale", "codes"))
    assert more.data_ptr() == codes.data_ptr() + 4096
    assert abs(scale.data_ptr() - codes.data_ptr()) >= MAPPING_BYTES


def test_each_tensor_has_a_storage_of_its_own(part):
    """safetensors refuses to save tensors that share one."""
    first, second = empty_weight(part, 5000, torch.int32), empty_weight(part, 5000, torch.int32)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == 20000


def test_a_tensor_larger_than_a_mapping_has_room(part):
    size = MAPPING_BYTES + (1 << 20)
    large, small = empty_weight(part, size, torch.uint8), empty_weight(part, 4096, torch.uint8)
    small.fill_(2)
    large[-4096:] = 1
    assert small.data_ptr() == large.data_ptr() + size  # in what was left of the last page
    assert int(large[-4096:].sum(dtype=torch.int64)) == 4096
    assert int(small.sum(dtype=torch.int64)) == 2 * 4096


def test_memory_goes_with_its_last_tensor(part):
    first, second = empty_weight(part, 5000, torch.int32), empty_weight(part, 5000, torch.int32)
    place = first.data_ptr()
    del first
    gc.collect()
    assert is_mapped(place)
    del second
    gc.collect()
    assert not is_mapped(place)


def test_meta_tensors_stay_meta():
    with torch.device("meta"):
        assert empty_weight("weight_packed", 5000, torch.int32).is_meta
