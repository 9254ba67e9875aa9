"""Checkpoints have exactly the predicted bytes, hold exactly the chosen candidates, and are refused otherwise."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.contract.bank import BANK_NAME
from allocator.contract.checkpoint import check_checkpoint, check_digests
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import INDEX_NAME, read_folder_headers
from allocator.evaluate import load_dequantized
from allocator.export import export_checkpoint
from allocator.model import model_digest, read_inventory
from allocator.pipeline.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
from allocator.quantize import BankReader, make_servable
from allocator.score import LearningSettings
from allocator.solve.units import Rules

LEARNING = LearningSettings(batch_tokens=128)


@dataclass(frozen=True)
class Fitted:
    model: Path
    bank: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def fitted(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fitted]:
    made: dict[tuple[str, bool], Fitted] = {}

    def make(kind: str = "llama", symmetric: bool = False) -> Fitted:
        if (kind, symmetric) not in made:
            model = tiny_model(kind)
            candidates = CandidateSettings(
                quantizer="rtn", group_size=32, symmetric=symmetric, sequences=4, sequence_length=32
            )
            result = learn(model, tmp_path_factory.mktemp("work"), candidates, LEARNING)
            manifest = solve_scores(result.scores, SolveSettings(average_bits=4.5))
            made[kind, symmetric] = Fitted(model, result.bank_folder, manifest)
        return made[kind, symmetric]

    return make


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_predicted_bytes_are_written_bytes(
    kind: str, symmetric: bool, fitted: Callable[..., Fitted], tmp_path: Path
) -> None:
    f = fitted(kind, symmetric)
    report = export(f.manifest, f.model, f.bank, tmp_path / "out")
    assert (
        report.predicted == report.written == {"model.safetensors": (tmp_path / "out/model.safetensors").stat().st_size}
    )
    assert sum(t.nbytes for t in read_folder_headers(tmp_path / "out").values()) == f.manifest.tensor_bytes
    assert f.manifest.tensor_bytes <= f.manifest.budget.nbytes
    assert len({m.num_bits for m in f.manifest.modules.values()}) > 2
    assert check_digests(tmp_path / "out", f.manifest) == len(read_folder_headers(tmp_path / "out"))


def test_many_files_have_the_predicted_bytes_too(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted()
    inventory = read_inventory(f.model)
    report = export_checkpoint(
        f.manifest, inventory, model_digest(inventory), BankReader(f.bank), tmp_path / "out", max_shard_bytes=20_000
    )
    assert len(report.written) > 3
    assert report.predicted == report.written
    assert (tmp_path / "out" / INDEX_NAME).exists()
    check_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_the_checkpoint_holds_the_chosen_candidates(kind: str, fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted(kind)
    export(f.manifest, f.model, f.bank, tmp_path / "out")
    model, bank = load_dequantized(tmp_path / "out"), BankReader(f.bank)
    for name, module in f.manifest.modules.items():
        weight = model.get_parameter(f"{name}.weight")
        if module.quantized:
            assert torch.equal(weight, bank.dequantized(name, module)), name
    assert torch.isfinite(model(torch.arange(16).unsqueeze(0)).logits).all()


def test_tokenizer_and_generation_files_come_along(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted()
    export(f.manifest, f.model, f.bank, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (f.model / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "gamma"
    assert config == json.loads((f.model / "config.json").read_text())


def test_all_chat_templates_come_along(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    """As transformers saves those of a tokenizer that has several: without `tool_use` tools are not rendered."""
    from transformers import AutoTokenizer

    f = fitted()
    model = Path(shutil.copytree(f.model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "chat {{ messages }}", "tool_use": "tools {{ tools }}"}
    tokenizer.save_pretrained(model)
    export(f.manifest, model, f.bank, tmp_path / "out")
    make_servable(read_inventory(model), tmp_path / "bank")
    for folder in ("out", "bank"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == tokenizer.chat_template


def test_an_existing_folder_is_not_touched(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted()
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="--out"):
            export(f.manifest, f.model, f.bank, out, overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious.txt"]


def test_overwrite_replaces_a_gamma_checkpoint(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted()
    export(f.manifest, f.model, f.bank, tmp_path / "out")
    (tmp_path / "out/stale.bin").write_text("old")
    export(f.manifest, f.model, f.bank, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/stale.bin").exists()
    check_checkpoint(tmp_path / "out")


def test_another_model_is_refused_with_both_digests(
    fitted: Callable[..., Fitted], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    f = fitted()
    with pytest.raises(ContractError) as error:
        export(f.manifest, tiny_model("qwen2"), f.bank, tmp_path / "out")
    assert f.manifest.model.digest in str(error.value)
    assert model_digest(read_inventory(tiny_model("qwen2"))) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_another_bank_is_refused_with_both_digests(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f, other = fitted(), fitted("llama", True)
    with pytest.raises(ContractError) as error:
        export(f.manifest, f.model, other.bank, tmp_path / "out")
    assert f.manifest.bank_digest in str(error.value)
    assert BankReader(other.bank).bank.digest in str(error.value)


def test_a_damaged_candidate_is_refused_by_name(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted()
    bank = tmp_path / "bank"
    shutil.copytree(f.bank, bank)
    name = next(name for name, module in f.manifest.modules.items() if module.quantized)
    path = bank / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ContractError, match=f"{name}: content is sha256"):
        export(f.manifest, f.model, bank, tmp_path / "out")
    path.write_bytes(content[:-10])
    with pytest.raises(ContractError, match="cut short"):
        BankReader(bank)
    path.unlink()
    with pytest.raises(ContractError, match="no such file"):
        BankReader(bank)
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_a_bank_with_a_changed_width_is_refused_by_name(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    f = fitted()
    bank = tmp_path / "bank"
    shutil.copytree(f.bank, bank)
    from allocator.contract.bank import Bank

    index = Bank.read(bank / BANK_NAME)
    name, module = next(iter(index.modules.items()))
    changed = [c.model_copy(update={"group_size": 64}) if c.num_bits == 3 else c for c in module.candidates]
    modules = index.modules | {name: module.model_copy(update={"candidates": changed})}
    index.model_copy(update={"modules": modules}).write(bank / BANK_NAME)
    with pytest.raises(ContractError, match=rf"{name}: w3\.weight_scale"):
        BankReader(bank)


def test_an_unfinished_export_leaves_nothing(
    fitted: Callable[..., Fitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = fitted()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("allocator.export.write_checkpoint.write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        export(f.manifest, f.model, f.bank, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_renders_tools_in_checkpoint_and_bank_as_in_the_model(
    fitted: Callable[..., Fitted], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    f = fitted()
    shutil.copytree(f.model, tmp_path / "model")
    shutil.copytree(f.bank, tmp_path / "bank")
    tokenizer = AutoTokenizer.from_pretrained(f.model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "TOOLS {{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    make_servable(read_inventory(tmp_path / "model"), tmp_path / "bank")
    report = export(f.manifest, tmp_path / "model", f.bank, tmp_path / "out")
    assert "additional_chat_templates/tool_use.jinja" in report.side_files.carried
    for folder in ("model", "out", "bank"):
        read = AutoTokenizer.from_pretrained(tmp_path / folder)
        told = read.apply_chat_template([{"role": "user", "content": "hi"}], tools=[{"name": "f"}], tokenize=False)
        assert told.startswith("TOOLS"), folder


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    tensors = {n: t.half() if "mlp" in n else t.float() for n, t in load_file(model / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    candidates = CandidateSettings(quantizer="rtn", group_size=32, sequences=2, sequence_length=32)
    learned = learn(model, tmp_path / "work", candidates, LearningSettings(draws=1, batch_tokens=128))
    manifest = solve_scores(
        learned.scores, SolveSettings(average_bits=6, rules=Rules(pins={"*.layers.0.self_attn.q_proj": 16}))
    )
    assert manifest.dtype == "F16"
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.weight: a weight is too large for F16"):
        export(manifest, model, learned.bank_folder, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))
