"""Digests of a checkpoint's tensors find what the cheap checks cannot: changed values."""

import pytest

from allocator.contract.checkpoint import DIGESTS_NAME, check_checkpoint, check_digests, digest_folder
from allocator.contract.errors import ContractError
from allocator.contract.safetensors_file import read_folder_headers


@pytest.fixture
def recorded(checkpoint, manifest):
    digest_folder(checkpoint, manifest).write(checkpoint / DIGESTS_NAME)
    return checkpoint


def test_a_checkpoint_as_it_was_written_passes(recorded, manifest):
    assert check_digests(recorded, manifest) == len(read_folder_headers(recorded))


def test_one_changed_bit_is_found_and_its_tensor_named(recorded, manifest):
    tensor = read_folder_headers(recorded)["model.layers.0.self_attn.q_proj.weight_scale"]
    content = bytearray(tensor.path.read_bytes())
    content[tensor.start + 5] ^= 1
    tensor.path.write_bytes(content)
    check_checkpoint(recorded)  # shapes, dtypes and bytes are as declared
    with pytest.raises(ContractError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.weight_scale is sha256"):
        check_digests(recorded, manifest)


def test_digests_of_another_manifest_are_refused(recorded, manifest):
    other = manifest.model_copy(update={"method": "uniform"})
    with pytest.raises(ContractError, match=f"was written for manifest {manifest.digest}"):
        check_digests(recorded, other)


def test_a_checkpoint_without_digests_says_what_to_do(checkpoint, manifest):
    with pytest.raises(ContractError, match="export the checkpoint again"):
        check_digests(checkpoint, manifest)
