"""Stage I learns what choices cost, in units of loss, reproducibly and at the budget it was given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.blocks import BlockStream
from allocator.blocks.gradients import fill_gradients
from allocator.blocks.hidden import HiddenStates
from allocator.candidates import BankReader
from allocator.contract.scores import Scores
from allocator.inventory import read_inventory
from allocator.learning import LearningSettings
from allocator.learning.lagrangian import AugmentedLagrangian
from allocator.learning.learn import _open_block, _Teacher
from allocator.learning.objective import reconstruction_loss
from allocator.learning.relaxation import expected_bytes, multiplier_of_budget, probabilities, sample
from allocator.pipeline import CandidateSettings, LearnResult, learn

CANDIDATES = CandidateSettings(quantizer="rtn", group_size=32, sequences=8, sequence_length=32)
LEARNING = LearningSettings(average_bits=4.0, passes=2, steps=8, batch_tokens=128)


@pytest.fixture(scope="module")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LearnResult:
    return learn(tiny_model("llama"), tmp_path_factory.mktemp("work"), CANDIDATES, LEARNING)


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
    fixed = [name for name, m in learned.scores.modules.items() if len(m.candidates) == 1]
    assert fixed == ["model.embed_tokens", "lm_head"]


def test_expected_bytes_meet_the_training_budget(learned: LearnResult) -> None:
    outcome = learned.scores.settings["outcome"]
    assert outcome["expected_bytes"] == pytest.approx(outcome["budget_bytes"], rel=0.02)


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
    longer = LearningSettings(average_bits=4.0, passes=1, steps=4, batch_tokens=128)
    assert learn(tiny_model("llama"), work, CANDIDATES, longer).reused == ["bank"]
    other_text = CandidateSettings(quantizer="rtn", group_size=32, sequences=8, sequence_length=32, seed=1)
    assert learn(tiny_model("llama"), work, other_text, longer).reused == []


def test_no_hidden_states_are_left_behind(learned: LearnResult) -> None:
    left = {p.name for p in learned.scores_path.parent.iterdir()} - {"model-digest.json"}
    assert left == {"bank", "run.json", "scores.json"}


def test_marginal_losses_match_measured_ones(
    learned: LearnResult, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """At a sampled assignment, what exchanging one module's candidate really does to the block's loss."""
    inventory = read_inventory(tiny_model("llama"))
    stream = BlockStream(inventory)
    work = learned.scores_path.parent
    bank = BankReader(learn(tiny_model("llama"), work, CANDIDATES, LEARNING).bank_folder)
    tokens = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(5))
    hidden = HiddenStates(tmp_path, 4, 32, 64)
    stream.fill(hidden, tokens)
    gradients = [hidden.beside(f"gradients-{draw}") for draw in range(8)]
    fill_gradients(stream, hidden, gradients, seed=0)
    batch = _Teacher(hidden, gradients).batch(stream, 0, torch.arange(4))
    learner, formats = _open_block(inventory, stream, bank, 0)
    grams = learner.measure_swaps({0: lambda: batch})[0]
    widths = [f.num_bits for f in formats["mlp.up_proj"]]
    choice = {name: widths.index(4) for name in formats}
    _, interactions = learner.interactions(choice, grams, batch)
    marginals = {name: torch.diagonal(grams[name]) + found for name, found in interactions.items()}

    def loss_with(name: str, index: int) -> float:
        weights = {f"{n}.weight": learner._candidates.weight(n, i) for n, i in (choice | {name: index}).items()}
        with torch.inference_mode():
            output = stream.run(learner._block, batch.states, weights)
            return float(reconstruction_loss(output, batch.teacher, batch.gradients))

    errors, truths = dict.fromkeys((2, 3, 4), 0.0), dict.fromkeys((2, 3, 4), 0.0)
    for name in formats:
        without = loss_with(name, widths.index(16))
        for width in errors:
            truth = loss_with(name, widths.index(width)) - without
            errors[width] += abs(float(marginals[name][widths.index(width)]) - truth)
            truths[width] += abs(truth)
    assert all(errors[width] < 0.2 * truths[width] for width in errors), (errors, truths)


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


def test_changed_scores_are_refused(learned: LearnResult, tmp_path: Path) -> None:
    from allocator.contract.errors import ContractError

    path = tmp_path / "scores.json"
    path.write_text(learned.scores_path.read_text().replace('"num_bits": 3', '"num_bits": 4', 1))
    with pytest.raises(ContractError, match=r"bytes at 4 bits|different widths"):
        Scores.read(path)


def test_losses_of_single_swaps_are_the_kl_that_they_cause(
    learned: LearnResult, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Read off one block, without running the rest of the model, within the noise of a few draws."""
    inventory = read_inventory(tiny_model("llama"))
    stream, bank = BlockStream(inventory), BankReader(learned.bank_folder)
    tokens = torch.randint(0, 320, (16, 48), generator=torch.Generator().manual_seed(7))
    hidden = HiddenStates(tmp_path / "states", 16, 48, 64)
    stream.fill(hidden, tokens)
    gradients = [hidden.beside(f"g{i}") for i in range(8)]
    fill_gradients(stream, hidden, gradients, seed=0)
    original = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.inference_mode():
        p = original(tokens).logits.double().log_softmax(-1)
    ratios = []
    for index in range(2):
        learner, formats = _open_block(inventory, stream, bank, index)
        batch = _Teacher(hidden, gradients).batch(stream, index, torch.arange(16))
        grams = learner.measure_swaps({0: lambda batch=batch: batch})[0]
        for name, gram in grams.items():
            candidate = next(i for i, f in enumerate(formats[name]) if f.num_bits == 5)
            weight = original.get_parameter(f"{inventory.block_prefix(index)}{name}.weight")
            source = weight.data.clone()
            weight.data.copy_(learner._candidates.weight(name, candidate))
            with torch.inference_mode():
                q = original(tokens).logits.double().log_softmax(-1)
            weight.data.copy_(source)
            ratios.append(float(gram[candidate, candidate]) / float((p.exp() * (p - q)).sum(-1).mean()))
    assert all(0.7 < ratio < 1.4 for ratio in ratios), ratios
