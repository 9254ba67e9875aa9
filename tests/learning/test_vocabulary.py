"""What candidates of the embedding and the lm_head do to the predictions, read in stripes, is what it is read whole."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allocator.blocks import BlockStream, calibration_from_model
from allocator.blocks.gradients import descend
from allocator.blocks.hidden import HiddenStates
from allocator.candidates import BankReader, VocabularyCandidates, reader
from allocator.inventory import read_inventory
from allocator.learning import LearningSettings
from allocator.learning.teacher import Teacher
from allocator.learning.vocabulary import measure_vocabulary
from allocator.pipeline import CandidateSettings, learn

CANDIDATES = CandidateSettings(quantizer="gptq", group_size=32, sequences=8, sequence_length=32)
LEARNING = LearningSettings(draws=16, batch_tokens=128)
DRAWS = 3


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def seen(request: Any, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A learned model with its text, states and gradients."""
    model, folder = tiny_model(request.param), tmp_path_factory.mktemp(request.param)
    learned = learn(model, folder / "work", CANDIDATES, LEARNING)
    stream, bank = BlockStream(read_inventory(model)), BankReader(learned.bank_folder)
    tokens = calibration_from_model(model, 8, 32, 0).token_ids
    hidden = HiddenStates(folder / "states", 8, 32, 64)
    stream.fill(hidden, tokens)
    teacher = Teacher.over(hidden, DRAWS)
    list(descend(stream, hidden, teacher.gradients, 0, to_embedding=True, drawn=teacher.drawn))
    return SimpleNamespace(
        model=model, learned=learned, stream=stream, bank=bank, tokens=tokens, hidden=hidden, teacher=teacher,
        candidates=VocabularyCandidates(stream.inventory, stream, bank),
    )  # fmt: skip


def measured(seen: Any) -> dict[str, torch.Tensor]:
    parts = {0: torch.arange(5), 1: torch.arange(5, 8)}
    found = measure_vocabulary(
        seen.stream, seen.bank, seen.candidates, seen.teacher, seen.tokens, parts, lambda errors: errors.clone()
    )
    shape = {0: (-1, DRAWS, 5 * 32), 1: (-1, DRAWS, 3 * 32)}
    return {name: torch.cat([found[n][name].view(shape[n]) for n in parts], 2).flatten(1) for name in found[0]}


def test_errors_are_the_changes_of_the_log_likelihood(seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slopes of log p(y) by the logits and by the embedding's output, by autograd and all at once."""
    monkeypatch.setattr(reader, "_STRIPE", 64)  # five stripes
    found = measured(seen)
    drawn = seen.teacher.drawn.boundary(0).long()
    states = seen.hidden.boundary(seen.stream.blocks)
    normed, softcap = seen.stream.norm()(states), seen.stream.softcap
    assert softcap is None
    for name, formats in seen.candidates.formats.items():
        source = seen.candidates.source(name)
        logits = (normed @ source.T).requires_grad_(True)
        for number, form in enumerate(formats[:-1]):
            step = seen.bank.dequantized(name, form) - source
            for draw in range(DRAWS):
                expected = torch.zeros(8, 32)
                if name == seen.candidates.head:
                    loss = -logits.log_softmax(-1).gather(-1, drawn[..., draw : draw + 1]).sum()
                    (slope,) = torch.autograd.grad(loss, logits)
                    expected += (slope * (normed @ step.T)).sum(-1)
                if name == seen.candidates.embedding:
                    rows = seen.stream.embed(seen.tokens, step)
                    expected += (rows * seen.teacher.gradients_at(seen.stream, 0, torch.arange(8))[draw]).sum(-1)
                got = found[name][number].view(DRAWS, 8 * 32)[draw]
                torch.testing.assert_close(got, expected.flatten(), rtol=1e-3, atol=1e-5)
        assert not found[name][-1].any()
