"""A bank is a model folder that can serve any manifest solved for it, and says what is wrong otherwise."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from allocator.contract.errors import ContractError
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import INDEX_NAME
from allocator.contract.served_bank import open_served_bank
from allocator.model import read_inventory
from allocator.pipeline import CandidateSettings, SolveSettings, learn, solve_scores
from allocator.quantize import make_servable
from allocator.score import LearningSettings
from allocator.solve import Rules

LEARNING = LearningSettings(batch_tokens=128)
Q = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Banked:
    model: Path
    bank: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def banked(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Banked:
    model = tiny_model("qwen3")
    candidates = CandidateSettings(quantizer="rtn", group_size=32, sequences=4, sequence_length=32)
    result = learn(model, tmp_path_factory.mktemp("work"), candidates, LEARNING)
    return Banked(
        model, result.bank_folder, solve_scores(result.scores, SolveSettings(average_bits=4.5, rules=Rules({Q: 4})))
    )


@pytest.fixture
def bank(banked: Banked, tmp_path: Path) -> Path:
    """A copy that a test may damage, with the manifest in it."""
    shutil.copytree(banked.bank, tmp_path / "bank", symlinks=True)
    banked.manifest.write(tmp_path / "bank" / "m.json")
    return tmp_path / "bank"


def test_a_learned_bank_can_be_served(banked: Banked, bank: Path) -> None:
    served = open_served_bank(bank, bank / "m.json", digests=True)
    assert served.manifest == banked.manifest
    assert served.file(Q).exists()
    assert not served.dropped
    assert (bank / "tokenizer.json").read_bytes() == (banked.model / "tokenizer.json").read_bytes()
    assert "quantization_config" not in json.loads((bank / "config.json").read_text())
    assert (bank / "model.safetensors").is_symlink()


def test_the_second_copy_of_a_tied_lm_head_is_left_out(banked: Banked, bank: Path, tmp_path: Path) -> None:
    shutil.copytree(banked.model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    make_servable(read_inventory(tmp_path / "model"), bank, copy=True)
    assert open_served_bank(bank, bank / "m.json").dropped == {"lm_head.weight"}
    assert not (bank / "model.safetensors").is_symlink()


def test_another_banks_manifest_is_refused(banked: Banked, bank: Path) -> None:
    banked.manifest.model_copy(update={"bank_digest": "sha256:" + "0" * 64}).write(bank / "other.json")
    with pytest.raises(ContractError, match=r"other\.json was solved for bank sha256:0000"):
        open_served_bank(bank, bank / "other.json")


def test_a_missing_candidate_file_is_named(bank: Path) -> None:
    (bank / f"{Q}.safetensors").unlink()
    with pytest.raises(ContractError, match=rf"{Q}\.safetensors: no such file"):
        open_served_bank(bank, bank / "m.json")


def test_a_candidate_of_another_shape_is_named(bank: Path) -> None:
    tensors = load_file(bank / f"{Q}.safetensors")
    tensors["w4.weight_packed"] = tensors["w4.weight_packed"][:, :-1].contiguous()
    save_file(tensors, bank / f"{Q}.safetensors", {"format": "pt"})
    with pytest.raises(ContractError, match=rf"{Q}: w4\.weight_packed is I32 \[128, 7\], 4 bits .* I32 \[128, 8\]"):
        open_served_bank(bank, bank / "m.json")


def test_changed_codes_are_found_when_digests_are_asked_for(bank: Path) -> None:
    tensors = load_file(bank / f"{Q}.safetensors")
    tensors["w4.weight_packed"] += 1
    save_file(tensors, bank / f"{Q}.safetensors", {"format": "pt"})
    open_served_bank(bank, bank / "m.json")
    with pytest.raises(ContractError, match=rf"{Q}: content is sha256:.*, the bank says sha256:"):
        open_served_bank(bank, bank / "m.json", digests=True)


def test_a_bank_without_the_models_files_says_what_to_do(bank: Path) -> None:
    (bank / INDEX_NAME).unlink()
    with pytest.raises(ContractError, match=r"cannot be served by itself\. Run `gamma learn` on it again"):
        open_served_bank(bank, bank / "m.json")


def test_an_index_that_leads_out_of_the_folder_is_refused(bank: Path) -> None:
    index = json.loads((bank / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (bank / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ContractError, match="no file name"):
        open_served_bank(bank, bank / "m.json")


def test_a_model_that_moved_is_named(bank: Path) -> None:
    (bank / "model.safetensors").unlink()
    (bank / "model.safetensors").symlink_to("/nowhere/model.safetensors")
    with pytest.raises(ContractError, match=r"model\.safetensors: no such file"):
        open_served_bank(bank, bank / "m.json")


def test_another_models_files_are_refused(bank: Path, tiny_model: Callable[[str], Path]) -> None:
    make_servable(read_inventory(tiny_model("llama")), bank)
    with pytest.raises(ContractError, match=r"q_proj\.weight is BF16 .* in the model, the manifest says"):
        open_served_bank(bank, bank / "m.json")


def test_a_model_without_the_prefix_is_copied_into_the_bank_under_the_names_that_servers_know(
    banked: Banked, bank: Path, tmp_path: Path
) -> None:
    shutil.copytree(banked.model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    make_servable(read_inventory(tmp_path / "model"), bank)
    open_served_bank(bank, bank / "m.json")
    copied = load_file(bank / "model.safetensors")
    assert copied.keys() == tensors.keys()
    assert all(torch.equal(copied[name], tensors[name]) for name in tensors)
