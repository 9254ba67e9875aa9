"""Stage I learns what choices cost, in units of loss, reproducibly and at the budget it was given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model
from allocator.blocks.gradients import fill_gradients
from allocator.blocks.hidden_states import HiddenStates
from allocator.contract.errors import InputError
from allocator.contract.layout import WIDTHS
from allocator.contract.scores import Scores
from allocator.evaluate import Student
from allocator.model import read_inventory
from allocator.pipeline import CandidateSettings, LearnResult, learn
from allocator.quantize import BankReader
from allocator.quantize.candidates import BlockCandidates
from allocator.score import LearningSettings
from allocator.score.objective import Kinds, correlations, errors_along, losses_of_errors
from allocator.score.swapped_block import Batch
from allocator.score.teacher import Teacher
from allocator.solve.quadratic import pair_terms

OpenBlock = tuple[BlockStream, torch.nn.Module, BlockCandidates, Batch]

CANDIDATES = CandidateSettings(quantizer="rtn", group_size=32, sequences=8, sequence_length=32)
LEARNING = LearningSettings(draws=16, batch_tokens=128)


@pytest.fixture(scope="module")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LearnResult:
    return learn(tiny_model("llama"), tmp_path_factory.mktemp("work"), CANDIDATES, LEARNING)


@pytest.fixture
def open_block(learned: LearnResult, tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[int], OpenBlock]:
    """A block with its candidates and the batch of all calibration text, as stage I saw them."""

    def open_one(index: int) -> OpenBlock:
        inventory = read_inventory(tiny_model("llama"))
        stream, bank = BlockStream(inventory), BankReader(learned.bank_folder)
        tokens = calibration_from_model(tiny_model("llama"), 8, 32, 0).token_ids
        hidden = HiddenStates(tmp_path / "states", 8, 32, 64)
        stream.fill(hidden, tokens)
        teacher = Teacher.over(hidden, LEARNING.draws)
        fill_gradients(stream, hidden, teacher.gradients, 0)
        block = stream.block(index)
        candidates = BlockCandidates(inventory, stream, bank, index, block)
        return stream, block, candidates, teacher.batch(stream, index, torch.arange(8))

    return open_one


def test_scores_are_losses_above_the_16_bit_weight(learned: LearnResult) -> None:
    totals: dict[int, float] = {}
    for name, module in learned.scores.modules.items():
        scores = {c.format.num_bits: c.score for c in module.candidates}
        assert scores[16] == pytest.approx(0, abs=1e-6), name
        if len(scores) > 1:
            assert scores[2] > scores[3] > 0, name
            totals = {bits: totals.get(bits, 0) + score for bits, score in scores.items()}
    assert totals[2] > totals[3] > totals[4] > totals[6] > 0


def test_every_module_of_the_model_has_scores(learned: LearnResult, tiny_model: Callable[[str], Path]) -> None:
    inventory = read_inventory(tiny_model("llama"))
    assert list(learned.scores.modules) == [m.name for m in inventory.modules]
    assert all([c.format.num_bits for c in m.candidates] == list(WIDTHS) for m in learned.scores.modules.values())


def test_the_same_seed_gives_the_same_file(
    learned: LearnResult, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    again = learn(tiny_model("llama"), tmp_path, CANDIDATES, LEARNING)
    assert again.scores_path.read_bytes() == learned.scores_path.read_bytes()


def test_a_second_run_uses_what_is_there_and_only_what_fits(
    learned: LearnResult, tiny_model: Callable[[str], Path]
) -> None:
    work = learned.scores_path.parent
    assert learn(tiny_model("llama"), work, CANDIDATES, LEARNING).reused == ["bank", "scores"]
    longer = LearningSettings(draws=2, batch_tokens=128)
    assert learn(tiny_model("llama"), work, CANDIDATES, longer).reused == ["bank"]
    other_text = CandidateSettings(quantizer="rtn", group_size=32, sequences=8, sequence_length=32, seed=1)
    assert learn(tiny_model("llama"), work, other_text, longer).reused == []


def test_no_hidden_states_are_left_behind(learned: LearnResult) -> None:
    left = {p.name for p in learned.scores_path.parent.iterdir()} - {"model-digest.json"}
    assert left == {"bank", "run.json", "scores.json"}


def test_pairs_are_what_two_swaps_do_together(learned: LearnResult, open_block: Callable[[int], OpenBlock]) -> None:
    """Two candidates of one block, swapped in together: the loss is the sum of theirs and twice their term."""
    stream, block, candidates, batch = open_block(0)
    terms = pair_terms(learned.scores)
    number = {(name, c.format.num_bits): i for i, (name, c) in enumerate(learned.scores.interacting())}
    score = {key: c.score for key, (_, c) in zip(number, learned.scores.interacting(), strict=True)}
    for a, b in (
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.up_proj", "mlp.down_proj"),
        ("self_attn.v_proj", "self_attn.o_proj"),
    ):
        weights = {f"{n}.weight": candidates.weight(n, WIDTHS.index(4)) for n in (a, b)}
        with torch.inference_mode():
            errors = errors_along(stream.run(block, batch.states, weights), batch.teacher, batch.gradients)
        keys = [(f"model.layers.0.{n}", 4) for n in (a, b)]
        alone = sum(score[key] for key in keys)
        together = float(losses_of_errors(errors.unsqueeze(0)))
        assert alone + 2 * terms[number[keys[0]], number[keys[1]]] == pytest.approx(together, rel=0.1)


def test_correlations_that_chance_makes_are_shrunk_away() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(40, 4096, generator=generator)
    errors[1] = 0.6 * errors[0] + 0.8 * errors[1]
    # Two blocks of ten modules; candidates 0 to 19, in the first block, are of 2 bits, the others of 8.
    number = torch.arange(40)
    kinds = Kinds(modules=number // 2, blocks=number // 20, widths=torch.where(number < 20, 2, 8))
    for module in range(2, 20):
        errors[module] = 0.5 * errors[module % 2] + 0.866 * errors[module]
    found = correlations(errors / errors.square().mean(1, keepdim=True).sqrt(), kinds)
    raw = errors[:20] @ errors[:20].T / 4096
    together = raw.abs() > 0.15
    torch.testing.assert_close(found[:20, :20][together], raw[together], rtol=0.1, atol=0.02)
    noise = found[20:, :20]
    assert float(noise.abs().mean()) < 0.3 * float((errors[20:] @ errors[:20].T / 4096).abs().mean())


def test_the_least_eigenvalue_bounds_every_assignment(learned: LearnResult) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [name for name, module in learned.scores.modules.items() if len(module.candidates) > 1]
    terms = pair_terms(learned.scores)
    numbers = {name: [i for i, (n, _) in enumerate(learned.scores.interacting()) if n == name] for name in names}
    score = [c.score for _, c in learned.scores.interacting()]
    assert learned.scores.interactions is not None
    for _ in range(20):
        chosen = [of[int(torch.randint(len(of), (1,), generator=generator))] for of in numbers.values()]
        total = sum(score[i] for i in chosen)
        cost = total + terms[chosen][:, chosen].sum()
        assert cost >= learned.scores.interactions.least_eigenvalue * total - 1e-12


def test_measured_swaps_rank_widths(learned: LearnResult, tiny_model: Callable[[str], Path]) -> None:
    work = learned.scores_path.parent
    found = learn(tiny_model("llama"), work, CANDIDATES, LearningSettings(method="measured", batch_tokens=128))
    assert found.scores.method == "measured"
    assert found.scores.interactions is None
    for name, module in found.scores.modules.items():
        scores = {c.format.num_bits: c.score for c in module.candidates}
        assert scores[16] == 0, name
        if len(scores) > 1:
            assert scores[2] > scores[4] > scores[8] > 0, name
    learn(tiny_model("llama"), work, CANDIDATES, LEARNING)


def test_an_unknown_method_is_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"choose from gamma, relaxed, measured, uniform$"):
        learn(tiny_model("llama"), tmp_path, CANDIDATES, LearningSettings(method="guess"))


def test_changed_scores_are_refused(learned: LearnResult, tmp_path: Path) -> None:
    from allocator.contract.errors import ContractError

    path = tmp_path / "scores.json"
    path.write_text(learned.scores_path.read_text().replace('"num_bits": 3', '"num_bits": 4', 1))
    with pytest.raises(ContractError, match=r"bytes at 4 bits|different widths"):
        Scores.read(path)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_losses_of_single_swaps_are_the_kl_that_they_cause(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Read off one block, or the rows and the logits, without running the rest of the model, within the noise of a few
    draws: with embedding and lm_head apart, with one module for both, and with an embedding whose rows are scaled."""
    result = learn(tiny_model(kind), tmp_path, CANDIDATES, LEARNING)
    inventory = read_inventory(tiny_model(kind))
    tokens = calibration_from_model(tiny_model(kind), 16, 48, 7).token_ids
    student = Student(BlockStream(inventory), BankReader(result.bank_folder), tokens)
    ratios = {}
    for name, candidate in result.scores.interacting():
        # Of the blocks of the tiny Gemma, whose attention hardly counts, there is too little text here.
        if candidate.format.num_bits == 5 and (kind != "gemma3" or "layers" not in name):
            ratios[name] = candidate.score / float(student.losses({name: candidate.format}).kl.mean())
    assert all(0.6 < ratio < 1.6 for ratio in ratios.values()), ratios
    assert "model.embed_tokens" in ratios
