"""What compressed-tensors is told of a checkpoint, and which assignments cannot be told."""

import json

import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.compressed_tensors import compressed_tensors_config, unequal_groups
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat

SIXTEEN = ModuleFormat(shape=(64, 64), num_bits=16)


def at(num_bits, group_size=32, symmetric=True):
    return ModuleFormat(shape=(64, 64), num_bits=num_bits, group_size=group_size, symmetric=symmetric)


def test_modules_of_one_format_share_a_group_and_all_others_are_ignored():
    modules = {"a.q": at(4), "a.k": at(4), "b": at(3), "c": at(4, 64), "d": at(4, 64, False), "e": SIXTEEN}
    config = compressed_tensors_config(modules)
    weights = {tuple(g["targets"]): g["weights"] for g in config["config_groups"].values()}
    assert set(weights) == {("a.q", "a.k"), ("b",), ("c",), ("d",)}
    assert weights["d",] | {"num_bits": 4, "group_size": 64, "symmetric": False} == weights["d",]
    assert config["ignore"] == ["e"]
    assert json.loads(json.dumps(config)) == config


def test_unequal_modules_of_a_fused_layer_are_found():
    modules = {"q": at(4), "k": at(4), "v": at(3), "gate": SIXTEEN, "up": at(4), "o": at(2)}
    unequal = unequal_groups(modules, {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")})
    assert unequal["qkv"] == {"q": "4 bits", "k": "4 bits", "v": "3 bits"}
    assert unequal["gate_up"] == {"gate": "16 bits", "up": "4 bits"}
    assert unequal_groups(modules | {"v": at(4)}, {"qkv": ("q", "k", "v")}) == {}


def test_equal_widths_with_and_without_zero_points_are_unequal():
    unequal = unequal_groups({"gate": at(4), "up": at(4, symmetric=False)}, {"gate_up": ("gate", "up")})
    assert unequal["gate_up"]["up"] == "4 bits in groups of 32 with zero points"


def test_all_experts_of_a_block_are_one_layer():
    modules = {"m.experts.0.gate_proj": at(4), "m.experts.0.down_proj": at(3)}
    groups = {"m.experts.w13": ["m.experts.0.gate_proj"], "m.experts.w2": ["m.experts.0.down_proj"]}
    assert list(unequal_groups(modules, groups)) == ["m.experts"]


@pytest.fixture
def declared(checkpoint, manifest):
    """The checkpoint of the other tests, declared for compressed-tensors."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": compressed_tensors_config(manifest.modules)}))
    return checkpoint


def test_such_a_checkpoint_is_checked_like_any_other(declared, manifest):
    config, found = check_checkpoint(declared)
    assert config.modules == manifest.modules
    assert found == manifest


def test_a_changed_declaration_is_refused(declared):
    path = declared / "config.json"
    config = json.loads(path.read_text())
    next(iter(config["quantization_config"]["config_groups"].values()))["weights"]["num_bits"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(ContractError, match="quantization_config says config_groups"):
        check_checkpoint(declared)


def test_a_checkpoint_of_others_is_no_gamma_checkpoint(declared):
    (declared / "gamma_manifest.json").unlink()
    with pytest.raises(ContractError, match="this is no gamma checkpoint"):
        check_checkpoint(declared)
