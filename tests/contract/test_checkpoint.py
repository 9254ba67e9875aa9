"""A checkpoint folder that does not hold exactly what it declares is refused before anything is served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.contract.checkpoint import CheckpointConfig, check_checkpoint
from allocator.contract.errors import ContractError
from allocator.contract.manifest import MANIFEST_NAME, Manifest

QUERY = "model.layers.0.self_attn.q_proj"


def test_sound_folder_passes_and_gives_back_what_was_exported(checkpoint, manifest):
    config, found = check_checkpoint(checkpoint)
    assert found == manifest
    assert config.modules == manifest.modules


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


CONFIG_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "changed width": (
        lambda q: q["modules"][QUERY].update(num_bits=3),
        f"{QUERY}: .*says 3 bits .*says 4 bits",
    ),
    "changed shape": (
        lambda q: q["modules"][QUERY].update(shape=[32, 64]),
        rf"{QUERY}: .*\[32, 64\].*\[16, 64\]",
    ),
    "changed group": (lambda q: q["modules"][QUERY].update(group_size=64), f"{QUERY}: .*group 64.*group 32"),
    "changed symmetry": (
        lambda q: q["modules"][QUERY].update(symmetric=False),
        f"{QUERY}: .*asymmetric.*says .* symmetric",
    ),
    "module removed": (lambda q: q["modules"].pop(QUERY), f"{QUERY}: .*says nothing, .*says 4 bits"),
    "module added": (lambda q: q["modules"].update(x={"shape": [1, 1], "num_bits": 16}), "x: .*16 bits.*nothing"),
    "width that does not exist": (lambda q: q["modules"][QUERY].update(num_bits=7), f"{QUERY}.*given 7"),
    "unknown version": (lambda q: q.update(schema_version=2), "schema_version is 2, this release reads 1"),
    "version true": (lambda q: q.update(schema_version=True), "schema_version is True"),
    "unknown key": (lambda q: q.update(colour="red"), "colour: Extra inputs"),
    "unknown key in a module": (lambda q: q["modules"][QUERY].update(bits=4), f"{QUERY}.bits: Extra inputs"),
    "other manifest": (lambda q: q.update(manifest_digest="sha256:" + "e" * 64), "was written for manifest sha256:e"),
    "other model": (lambda q: q.update(model_digest="sha256:" + "e" * 64), "of model sha256:e.*of model sha256:a"),
    "other dtype": (lambda q: q.update(dtype="F16"), "was written for manifest"),
    "other method": (lambda q: q.update(quant_method="awq"), "this is no gamma checkpoint"),
    "no modules": (lambda q: q.pop("modules"), "modules: Field required"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_changed_config_is_refused(checkpoint, damage):
    change, message = CONFIG_DAMAGE[damage]
    edit_config(checkpoint, change)
    with pytest.raises(ContractError, match=message):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"quantization_config": null}', '{"quantization_config": 1}', "NaN"])
def test_config_that_is_none_of_ours_is_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ContractError, match=r"config\.json"):
        check_checkpoint(checkpoint)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


PACKED, SCALE = f"{QUERY}.weight_packed", f"{QUERY}.weight_scale"
TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing codes": (lambda t: t.pop(PACKED), f"{QUERY} is declared at 4 bits, but {PACKED} is missing"),
    "missing scale": (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
    "missing 16-bit weight": (lambda t: t.pop("lm_head.weight"), "lm_head is declared at 16 bits"),
    "codes of another width": (
        lambda t: t.update({PACKED: t[PACKED][:, :4]}),
        rf"{PACKED} is I32 \[16, 4\] .*4 bits at shape \[16, 64\] need I32 \[16, 8\]",
    ),
    "rows cut": (lambda t: t.update({PACKED: t[PACKED][:8]}), rf"{PACKED} is I32 \[8, 8\].*need I32 \[16, 8\]"),
    "scale of another dtype": (lambda t: t.update({SCALE: t[SCALE].half()}), f"{SCALE} is F16 .* need BF16"),
    "two declarations at once": (
        lambda t: t.update({f"{QUERY}.weight": torch.zeros(16, 64)}),
        f"{QUERY}.weight contradicts the declared width",
    ),
    "zero points of a symmetric module": (
        lambda t: t.update({f"{QUERY}.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}),
        f"{QUERY}.weight_zero_point contradicts",
    ),
    "an additional tensor": (
        lambda t: t.update(extra=torch.zeros(1)),
        "outside the program have 132 bytes, the manifest says 128",
    ),
    "a lost norm": (lambda t: t.pop("model.norm.weight"), "have 0 bytes, the manifest says 128"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_tensors_that_contradict_the_declaration_are_refused(checkpoint, damage):
    change, message = TENSOR_DAMAGE[damage]
    edit_tensors(checkpoint, change)
    with pytest.raises(ContractError, match=message):
        check_checkpoint(checkpoint)


def test_truncated_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContractError, match="the file is cut short or damaged"):
        check_checkpoint(checkpoint)


def test_manifest_of_another_export_is_refused(checkpoint, manifest):
    other = manifest.model_copy(update={"method": "uniform"})
    other.write(checkpoint / MANIFEST_NAME)
    with pytest.raises(ContractError, match=f"was written for manifest {manifest.digest}.* is {other.digest}"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("lost", ["config.json", MANIFEST_NAME, "model.safetensors"])
def test_lost_file_is_named(checkpoint, lost):
    (checkpoint / lost).unlink()
    with pytest.raises(ContractError, match="no safetensors" if lost.startswith("model") else f"{lost}: no such file"):
        check_checkpoint(checkpoint)


def test_config_follows_from_the_manifest(manifest):
    config = CheckpointConfig.of_manifest(manifest)
    again = CheckpointConfig.parse(config.model_dump(mode="json", exclude_none=True))
    assert again == config
    assert isinstance(manifest, Manifest)
