"""`--granularity channel-block` from the model to the checkpoint: the same function, the exact bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import allocator.integrations.transformers as integration
from allocator.blocks import BlockStream
from allocator.cli.main import main
from allocator.contract.channel_blocks import ChannelBlocks
from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.modules import row_block_of
from allocator.contract.safetensors_file import read_folder_headers
from allocator.evaluate import Student, load_dequantized, measure_divergence
from allocator.export import ExportSettings
from allocator.model import channel_layout, read_inventory, read_shape
from allocator.pipeline import CandidateSettings, LearnResult, SolveSettings, export, learn, solve_scores
from allocator.plan.schema import PlanRequest
from allocator.plan.weights import check_formats, residency_of
from allocator.quantize import BankReader
from allocator.quantize.channel_order import laid_out
from allocator.report.grid import grid_of
from allocator.score import LearningSettings
from allocator.solve import solve_resident

SMALL = CandidateSettings(
    quantizer="gptq", group_size=32, sequences=4, sequence_length=32, widths=(2, 3, 4, 8, 16), channel_blocks=4
)
TOKENS = torch.arange(48).unsqueeze(0)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def learned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> LearnResult:
    return learn(model, tmp_path_factory.mktemp("work"), SMALL, LearningSettings(draws=2))


@pytest.fixture(scope="module")
def exported(model: Path, learned: LearnResult, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=4.0))
    out = tmp_path_factory.mktemp("checkpoint") / "gamma"
    report = export(manifest, model, learned.bank_folder, out)
    assert report.predicted == report.written
    return manifest, out


def test_the_model_cut_and_sorted_computes_the_same(model: Path, learned: LearnResult) -> None:
    plain = read_inventory(model)
    arranged = BankReader(learned.bank_folder).arranged(plain)
    assert sum(m.parameters for m in arranged.modules) == sum(m.parameters for m in plain.modules)
    states = torch.randn(2, 16, 64)
    for index in range(plain.blocks):
        outputs = []
        for inventory in (plain, arranged):
            stream = BlockStream(inventory)
            outputs.append(stream.run(stream.block(index), states))
        assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5)
        order = BankReader(learned.bank_folder).bank.channel_order
        assert order is not None
        assert list(order.order(f"model.layers.{index}.mlp")) != list(range(96))


def test_widths_differ_inside_a_module_and_all_bytes_are_predicted(exported: tuple[Manifest, Path]) -> None:
    manifest, out = exported
    widths = {n: f.num_bits for n, f in manifest.modules.items() if row_block_of(n) is not None}
    assert len(widths) == 2 * 2 * 4
    assert len({widths[n] for n in widths if n.startswith("model.layers.0.mlp.gate_proj")}) > 1
    declared, _ = check_checkpoint(out)
    assert declared.channel_blocks == ChannelBlocks(blocks=4, chunks=8)
    assert sum(t.nbytes for t in read_folder_headers(out).values()) == manifest.tensor_bytes


def test_transformers_serves_what_was_measured(
    model: Path, learned: LearnResult, exported: tuple[Manifest, Path]
) -> None:
    manifest, out = exported
    packed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(packed.model.layers[0].mlp.gate_proj.rows[0], integration.PackedLinear)
    with torch.inference_mode():
        judged = load_dequantized(out)(TOKENS).logits
        assert torch.allclose(packed(TOKENS).logits, judged, rtol=1e-4, atol=1e-4)
    # The bank's candidates, the model's channels in their order, are the same model.
    bank = BankReader(learned.bank_folder)
    student = Student(BlockStream(bank.arranged(read_inventory(model))), bank, TOKENS)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    by_checkpoint = measure_divergence(original, load_dequantized(out), TOKENS)
    assert float(student.losses(manifest.modules).kl.mean()) == pytest.approx(by_checkpoint.kl, rel=1e-3)
    uncut = Student(BlockStream(read_inventory(model)), bank, TOKENS)
    with pytest.raises(ContractError, match="has no such module, as the bank"):
        uncut.losses(manifest.modules)


def test_at_16_bits_the_checkpoint_gives_the_original_logits(model: Path, learned: LearnResult, tmp_path: Path) -> None:
    _, high = learned.scores.feasible_bytes()
    manifest = solve_scores(learned.scores, SolveSettings(budget=str(high)))
    assert {f.num_bits for f in manifest.modules.values()} == {16}
    export(manifest, model, learned.bank_folder, tmp_path / "gamma")
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "gamma", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(same(TOKENS).logits, original(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_learned_again_all_is_used_again_and_other_numbers_of_blocks_are_not(
    model: Path, learned: LearnResult, tmp_path: Path
) -> None:
    shutil.copytree(learned.scores_path.parent, tmp_path / "work")
    again = learn(model, tmp_path / "work", SMALL, LearningSettings(draws=2))
    assert again.reused == ["bank", "scores"]
    whole = learn(
        model,
        tmp_path / "work",
        CandidateSettings(**(vars(SMALL) | {"channel_blocks": None})),
        LearningSettings(draws=2),
    )
    assert whole.reused == []
    assert not any(row_block_of(name) for name in whole.scores.modules)
    assert whole.scores.channel_blocks is None


def test_the_costliest_channels_are_in_the_first_piece_and_spread_over_chunks() -> None:
    losses = torch.tensor([0.0, 7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0])
    assert laid_out(losses, ChannelBlocks(blocks=2, chunks=2)).tolist() == [1, 3, 6, 4, 5, 7, 2, 0]


def test_compressed_tensors_cannot_declare_it(
    model: Path, learned: LearnResult, exported: tuple[Manifest, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="4 channel blocks, which compressed-tensors cannot say"):
        export(exported[0], model, learned.bank_folder, tmp_path / "out", ExportSettings("compressed-tensors"))


def test_tied_fusion_gives_both_modules_of_a_piece_one_width(learned: LearnResult) -> None:
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=4.5, fusion="tied"))
    for name, form in manifest.modules.items():
        if ".gate_proj.rows." in name:
            assert manifest.modules[name.replace("gate_proj", "up_proj")].num_bits == form.num_bits


def test_planned_bytes_pack_the_two_modules_of_a_piece_and_no_others(model: Path, learned: LearnResult) -> None:
    shape = read_shape(read_inventory(model).config)
    residency = residency_of(shape, PlanRequest(max_model_len=64, max_num_seqs=1, kernel="humming"))
    budget = 500_000
    manifest = solve_resident(learned.scores, SolveSettings(fusion="tied"), residency, budget, "a rank")
    check_formats(shape, manifest.modules)
    assert manifest.budget.resident_bytes == max(residency.stage_bytes(manifest.modules))
    # humming pads to 256 rows: both modules of a piece, 24 rows each, are padded together, once for each piece.
    pieces = [s for s in residency.segments(manifest.modules) if s[1] == 48]
    assert len(pieces) == 2 * 4
    many = residency.model_copy(update={"tensor_parallel_size": 16})
    with pytest.raises(InputError, match="laid out in 8 chunks, which tensor_parallel_size 16 does not divide"):
        solve_resident(learned.scores, SolveSettings(), many, budget, "a rank")


def test_a_checkpoint_is_planned_only_for_ranks_that_can_share_it(
    exported: tuple[Manifest, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(exported[1]), "--gpu", "rtx4090", "--tensor-parallel-size", "3"]) == 2
    assert "laid out in 8 chunks, which tensor_parallel_size 3 does not divide" in capsys.readouterr().err
    assert main(["plan", str(exported[1]), "--gpu", "rtx4090", "--max-model-len", "64"]) == 0


def test_tables_have_a_column_for_a_module_and_no_more(exported: tuple[Manifest, Path]) -> None:
    grid = grid_of({name: form.num_bits for name, form in exported[0].modules.items()})
    assert "mlp.gate_proj" in grid.kinds
    assert not any("rows" in kind for kind in grid.kinds)
    assert len(grid.cells[0]["mlp.gate_proj"]) == 4


@pytest.mark.parametrize(
    ("kind", "blocks", "reason"),
    [
        ("qwen3", 5, "does not divide the intermediate size 96; possible are 2, 3, 4, 6"),
        ("qwen3", 1, "cut into 2 pieces or more"),
        ("qwen3_moe", 4, "experts are not cut"),
        ("phi3", 4, "has no mlp.gate_proj, mlp.up_proj and mlp.down_proj in every block"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    tiny_model: Callable[[str], Path], kind: str, blocks: int, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        channel_layout(read_inventory(tiny_model(kind)), blocks)
