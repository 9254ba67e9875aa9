"""The published method: hard Gumbel samples at a training budget, and scores that carry no trace of its price."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model
from allocator.blocks.hidden_states import HiddenStates
from allocator.model import read_inventory
from allocator.pipeline import CandidateSettings, LearnResult, learn
from allocator.quantize import BankReader
from allocator.run.journal import Journal
from allocator.run.progress import silent
from allocator.score import LearningSettings
from allocator.score.methods import Task
from allocator.score.methods.relaxed import (
    AugmentedLagrangian,
    expected_bytes,
    interactions,
    multiplier_of_budget,
    probabilities,
    sample,
)
from allocator.score.objective import gram_matrix, reconstruction_loss
from allocator.score.swaps import measure_swaps

CANDIDATES = CandidateSettings(quantizer="rtn", group_size=32, sequences=8, sequence_length=32)
LEARNING = LearningSettings(method="relaxed", average_bits=4.0, draws=8, batch_tokens=128)


@pytest.fixture(scope="module")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LearnResult:
    return learn(tiny_model("llama"), tmp_path_factory.mktemp("work"), CANDIDATES, LEARNING)


def test_expected_bytes_meet_the_training_budget(learned: LearnResult) -> None:
    outcome = learned.scores.settings["outcome"]
    assert outcome["expected_bytes"] == pytest.approx(outcome["budget_bytes"], rel=0.02)


def test_scores_are_losses_above_the_16_bit_weight(learned: LearnResult) -> None:
    totals: dict[int, float] = {}
    for name, module in learned.scores.modules.items():
        scores = {c.format.num_bits: c.score for c in module.candidates}
        assert scores[16] == pytest.approx(0, abs=1e-6), name
        if len(scores) > 1:
            totals = {bits: totals.get(bits, 0) + score for bits, score in scores.items()}
    assert totals[2] > totals[3] > totals[4] > totals[6] > 0


def test_marginal_losses_match_measured_ones(
    learned: LearnResult, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """At a sampled assignment, what exchanging one module's candidate really does to the block's loss."""
    inventory = read_inventory(tiny_model("llama"))
    stream, bank = BlockStream(inventory), BankReader(learned.bank_folder)
    tokens = calibration_from_model(tiny_model("llama"), 8, 32, 0).token_ids
    hidden = HiddenStates(tmp_path / "states", 8, 32, 64)
    stream.fill(hidden, tokens)
    task = Task(inventory, stream, bank, tokens, hidden, LEARNING, silent, Journal.nowhere())
    _, teacher = next((index, teacher) for index, teacher in task.backward_by_block("learning") if index == 0)
    batch = teacher.batch(stream, 0, torch.arange(8))
    block = stream.block(0)
    candidates = task.candidates(0, block)
    grams = measure_swaps(stream, block, candidates, {0: lambda: batch}, gram_matrix)[0]
    widths = [f.num_bits for f in candidates.formats["mlp.up_proj"]]
    drawn = {name: widths.index(4) for name in candidates.formats}
    _, found = interactions(task, block, candidates, drawn, grams, batch)

    def loss_with(name: str, number: int) -> float:
        weights = {f"{n}.weight": candidates.weight(n, i) for n, i in (drawn | {name: number}).items()}
        with torch.inference_mode():
            return float(reconstruction_loss(stream.run(block, batch.states, weights), batch.teacher, batch.gradients))

    off, truths = dict.fromkeys((2, 3, 4), 0.0), dict.fromkeys((2, 3, 4), 0.0)
    for name in candidates.formats:
        without = loss_with(name, widths.index(16))
        for width in off:
            number = widths.index(width)
            truth = loss_with(name, number) - without
            off[width] += abs(float(grams[name][number, number] + found[name][number]) - truth)
            truths[width] += abs(truth)
    assert all(off[width] < 0.2 * truths[width] for width in off), (off, truths)


def test_gumbel_samples_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    p = probabilities(torch.tensor([3.0, 1.0, 0.2]), torch.tensor([1.0, 2.0, 3.0]), 0.5, 0.7)
    counts = torch.bincount(torch.tensor([sample(p, generator) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts.double(), p.double(), atol=0.025, rtol=0)


def test_scores_can_be_read_back_from_probabilities() -> None:
    """The relation that de-tilting rests on: score = -T log p - multiplier * bytes + const."""
    scores, nbytes = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([10.0, 20.0, 40.0]).double()
    p = probabilities(scores, nbytes, 0.1, 0.8)
    restored = -0.8 * p.log() - 0.1 * nbytes
    torch.testing.assert_close(restored - restored[-1], scores)


def test_the_multiplier_meets_any_budget_between_the_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(4, generator=generator).double().sort(descending=True).values * 10**-i for i in range(6)]
    nbytes = [torch.tensor([100.0, 150.0, 200.0, 800.0]).double() * (i + 1) for i in range(6)]
    low, high = sum(float(n[0]) for n in nbytes), sum(float(n[-1]) for n in nbytes)
    for share in (0.05, 0.3, 0.7):
        budget = low + share * (high - low)
        multiplier, temperature = multiplier_of_budget(scores, nbytes, budget, 0.5)
        assert expected_bytes(scores, nbytes, multiplier, temperature) == pytest.approx(budget, rel=1e-3)


def test_the_augmented_lagrangian_reaches_its_constraint() -> None:
    """A toy whose expected bytes fall with the price: dual ascent ends where they meet the budget."""
    lagrangian = AugmentedLagrangian(multiplier=0.0, penalty=0.01, budget_bytes=50.0)
    for _ in range(200):
        lagrangian.update(100.0 / (1 + lagrangian.multiplier))
    assert 100.0 / (1 + lagrangian.multiplier) == pytest.approx(50.0, rel=1e-3)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_scores(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, saved, stop_at = Journal.save, 0, 0

    def save(journal: Journal, step: str, state: object, may_stop: bool = True) -> None:
        nonlocal saved
        original(journal, step, state, may_stop)
        saved += 1
        if saved == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "save", save)
    whole = learn(tiny_model("llama"), tmp_path / "whole", CANDIDATES, LEARNING).scores_path.read_bytes()
    steps = saved
    for share in (0.3, 0.8):
        stop_at, saved = int(share * steps), 0
        with pytest.raises(KeyboardInterrupt):
            learn(tiny_model("llama"), tmp_path / f"{share}", CANDIDATES, LEARNING)
        again = learn(tiny_model("llama"), tmp_path / f"{share}", CANDIDATES, LEARNING)
        assert again.scores_path.read_bytes() == whole
