"""What is read of the visible GPUs: nvidia-ml-py's own calls into a small libnvidia-ml.so.1 that is compiled here."""

from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from allocator.plan.gpus import find_gpu
from allocator.plan.visible_gpus import device_of_visible, read_devices
from tests.plan.nvml import L4, NEEDED, Card, library

pytestmark = NEEDED


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reading process looks for the library; no nvidia-smi beside it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")
    return tmp_path


def test_a_known_card_is_planned_as_the_catalogue_has_it(folder: Path) -> None:
    library(folder, L4)
    (found,) = read_devices()
    assert (found.name, found.memory_bytes, found.compute_capability) == ("NVIDIA L4", 23034 << 20, "8.9")
    assert device_of_visible([found], 1) == find_gpu("l4")


def test_of_several_cards_the_smallest_that_ranks_use_counts(folder: Path) -> None:
    library(folder, Card("NVIDIA H100 80GB HBM3", 81559, (9, 0)), L4)
    found = read_devices()
    assert [d.name for d in found] == ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    assert device_of_visible(found, 1).name == "NVIDIA H100 80GB HBM3"
    assert device_of_visible(found, 2) == find_gpu("l4")
    with pytest.raises(InputError, match="2 GPUs are visible, --tensor-parallel-size is 4"):
        device_of_visible(found, 4)


def test_a_mig_slice_is_a_device_of_its_own_memory(folder: Path) -> None:
    library(folder, Card("NVIDIA A100-SXM4-40GB", 40960, (8, 0), slices=2, slice_mib=9856))
    found = read_devices()
    assert [d.memory_bytes for d in found] == [9856 << 20] * 2
    device = device_of_visible(found, 1)
    assert (device.total_bytes, device.capability, device.basis) == (9856 << 20, (8, 0), "formula")
    library(folder, Card("NVIDIA A100-SXM4-40GB", 40960, (8, 0), slices=0))  # not partitioned
    assert device_of_visible(read_devices(), 1) == find_gpu("a100-40gb")


@pytest.mark.parametrize(
    "init", ["return 9;", "return *(volatile int *)0;", "for (;;);"], ids=["no driver", "crash", "hang"]
)
def test_a_driver_that_fails_is_no_gpu_and_no_error(folder: Path, init: str) -> None:
    library(folder, L4, init=init)
    assert read_devices(timeout_seconds=3) == []
