"""The GPU catalogue: names, slices, refusals, and files of the user."""

import json

import pytest

from allocator.contract.errors import ContractError, InputError
from allocator.plan import Catalogue, find_gpu, load_catalogue
from allocator.plan.gpus import cuda_memory

GIB = 2**30


@pytest.mark.parametrize(
    "name", ["rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "NVIDIA-GeForce-RTX-4090", "geforce rtx-4090"]
)
def test_names_aliases_and_labels_find_the_same_card(name):
    device = find_gpu(name)
    assert device.product_label == "NVIDIA-GeForce-RTX-4090"
    assert device.total_bytes == 24564 * 2**20
    assert (device.capability, device.resource) == ((8, 9), "nvidia.com/gpu")


@pytest.mark.parametrize("name", ["a100-40gb:3g.20gb", "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"])
def test_mig_slice_has_its_own_memory_resource_and_bandwidth(name):
    whole, part = find_gpu("a100-40gb"), find_gpu(name)
    assert part.resource == "nvidia.com/mig-3g.20gb"
    assert part.product_label == "NVIDIA-A100-SXM4-40GB-MIG-3g.20gb"
    assert part.total_bytes < whole.total_bytes / 2
    assert part.bandwidth_gb_per_second == whole.bandwidth_gb_per_second / 2


def test_cuda_never_sees_more_than_the_driver_reports():
    for gpu in load_catalogue():
        if gpu.why_not is None:
            device = find_gpu(gpu.name)
            assert 0.9 * device.total_bytes < device.cuda_bytes < device.total_bytes


def test_the_estimate_for_cards_without_a_measurement_is_below_every_measurement():
    for gpu in load_catalogue():
        if gpu.cuda_memory_mib is not None:
            assert cuda_memory(gpu.memory_mib) <= gpu.cuda_memory_mib * 2**20


REFUSED = {
    "rtx4091": "'rtx4091' is not known; nearest are rtx4090",
    "no such card at all": "without --gpu lists the known ones; or give --gpu-memory 24GiB",
    "v100": r"Tesla V100-SXM2-32GB has compute capability 7.0; .* need 7.5",
    "h100:9g.90gb": "has no MIG profile '9g.90gb'; it has 1g.10gb, 1g.20gb",
    "rtx4090:1g.5gb": "has no MIG profile '1g.5gb'; it has none",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_and_unusable_cards_are_refused_with_what_is_allowed(name):
    with pytest.raises(InputError, match=REFUSED[name]):
        find_gpu(name)


def catalogue(**gpu):
    card = {
        "name": "ACME One", "aliases": ["one"], "product_label": "ACME-One", "memory_mib": 30000,
        "compute_capability": "9.0", "bandwidth_gb_per_second": 1000,
    }  # fmt: skip
    return {"schema": "gamma.gpus", "schema_version": 1, "gpus": [card | gpu]}


def test_file_of_the_user_adds_cards_and_replaces_those_of_the_same_name(tmp_path):
    path = tmp_path / "gpus.json"
    path.write_text(json.dumps(catalogue(aliases=["one", "rtx4090"])))
    cards = load_catalogue(path)
    assert find_gpu("one", cards).total_bytes == 30000 * 2**20
    assert find_gpu("rtx4090", cards).name == "ACME One"
    assert find_gpu("h100", cards).name == "NVIDIA H100 80GB HBM3"


BROKEN = {
    "unknown key": ({"memory_gb": 5}, "memory_gb"),
    "capability": ({"compute_capability": "nine"}, "compute_capability"),
    "memory as text": ({"memory_mib": "30000"}, "memory_mib"),
    "cuda above driver": ({"cuda_memory_mib": 30001}, "cuda_memory_mib 30001 is more than memory_mib 30000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_of_the_user_is_refused_naming_the_key(tmp_path, case):
    change, message = BROKEN[case]
    path = tmp_path / "gpus.json"
    path.write_text(json.dumps(catalogue(**change)))
    with pytest.raises(ContractError, match=message):
        load_catalogue(path)


def test_published_schema_names_every_key():
    schema = Catalogue.published_schema()
    assert set(schema["required"]) == {"schema", "schema_version", "gpus"}
    assert "cuda_memory_mib" in schema["$defs"]["Gpu"]["properties"]
