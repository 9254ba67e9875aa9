"""What candidates of the embedding and the lm_head do to the predictions, read in stripes, is what it is read whole."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model
from allocator.blocks.gradients import backward_by_block, rows_together
from allocator.blocks.hidden_states import HiddenStates
from allocator.model import read_inventory
from allocator.pipeline import CandidateSettings, learn
from allocator.quantize import BankReader, VocabularyCandidates
from allocator.score import LearningSettings
from allocator.score.teacher import Teacher
from allocator.score.vocabulary import Text, measure_vocabulary

DRAWS, SEED = 3, 5


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def seen(
    request: Any, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A model with its bank, and a text with states and gradients, all in three stripes of the vocabulary of 320."""
    monkeypatch.setattr("allocator.blocks.gradients._HEAD_ROWS", 128)
    monkeypatch.setattr("allocator.blocks.gradients._HEAD_TOKENS", 12)
    model = tiny_model(request.param)
    candidates = CandidateSettings(quantizer="gptq", group_size=32, sequences=4, sequence_length=32)
    learned = learn(model, tmp_path / "work", candidates, LearningSettings(draws=1))
    stream, bank = BlockStream(read_inventory(model)), BankReader(learned.bank_folder)
    tokens = calibration_from_model(model, 8, 32, 0).token_ids
    hidden = HiddenStates(tmp_path / "states", 8, 32, 64)
    stream.fill(hidden, tokens)
    teacher = Teacher.over(hidden, DRAWS)
    list(backward_by_block(stream, hidden, teacher.gradients, SEED, to_embedding=True))
    return SimpleNamespace(
        stream=stream, bank=bank, tokens=tokens, hidden=hidden, teacher=teacher,
        candidates=VocabularyCandidates(stream.inventory, stream, bank),
        text=Text(teacher, tokens, SEED, {0: torch.arange(5), 1: torch.arange(5, 8)}),
    )  # fmt: skip


def signs_of(seen: SimpleNamespace, probe: int) -> torch.Tensor:
    """Of the tokens that are dealt to a probe, each stripe in turn, and 0 for the others: `[B, T, V]`."""
    found = []
    for rows in rows_together(320):
        number = torch.arange(rows.stop - rows.start) % DRAWS
        signs = torch.cat([seen.text.signs(batch, rows) for batch in (0, 1)])
        found.append(signs * (number == probe) * DRAWS**0.5)
    return torch.cat(found, 1).view(8, 32, 320)


def along_all_at_once(seen: SimpleNamespace, name: str, step: torch.Tensor) -> torch.Tensor:
    """What `measure_vocabulary` gives for a change of a weight, from whole logits and autograd: `[S, B, T]`."""
    found = torch.zeros(DRAWS, 8, 32)
    normed = seen.stream.norm()(seen.hidden.boundary(seen.stream.blocks))
    logits = (normed @ seen.candidates.source(name).T).requires_grad_(True)
    logprobs = logits.log_softmax(-1)
    for probe in range(DRAWS):
        if name == seen.candidates.head:
            weights = signs_of(seen, probe) * (logprobs.detach() / 2).exp()
            (slope,) = torch.autograd.grad(logprobs, logits, weights, retain_graph=True)
            found[probe] += (slope * (normed @ step.T)).sum(-1)
        if name == seen.candidates.embedding:
            gradients = seen.teacher.gradients_at(seen.stream, 0, torch.arange(8))[probe]
            found[probe] += (gradients * seen.stream.embed(seen.tokens, step)).sum(-1)
    return found


def test_errors_are_read_along_the_gradients(seen: SimpleNamespace) -> None:
    """In stripes and batches as all at once, in the order of `measure_swaps`: sequences, probes, tokens."""
    found = measure_vocabulary(seen.stream, seen.bank, seen.candidates, seen.text, lambda errors: errors.clone())
    assert found[0].keys() == seen.candidates.formats.keys()
    for name, formats in seen.candidates.formats.items():
        for number, form in enumerate(formats[:-1]):
            step = seen.bank.dequantized(name, form) - seen.candidates.source(name)
            expected = along_all_at_once(seen, name, step).transpose(0, 1)
            got = torch.cat([found[0][name][number].view(5, DRAWS, 32), found[1][name][number].view(3, DRAWS, 32)])
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
        assert not found[0][name][-1].any()


def test_the_lm_heads_gradients_are_those_of_the_blocks(seen: SimpleNamespace) -> None:
    """A change of the last states, taken through the final norm and the lm_head, is the same number by both."""
    change = 1e-3 * torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(1))
    states, norm = seen.hidden.boundary(seen.stream.blocks), seen.stream.norm()
    moved = torch.func.jvp(norm, (states,), (change,))[1]  # of the lm_head's input
    head = next(name for name in seen.candidates.formats if name == seen.candidates.head)
    source = seen.candidates.source(head)
    logprobs_of = lambda h: torch.nn.functional.linear(h, source).log_softmax(-1)  # noqa: E731
    logprobs, changed = torch.func.jvp(logprobs_of, (norm(states),), (moved,))
    last = HiddenStates(seen.hidden.folder.parent / "again", 8, 32, 64)
    last.boundary(seen.stream.blocks).copy_(states)
    teacher = Teacher.over(last, DRAWS)
    next(backward_by_block(seen.stream, last, teacher.gradients, SEED))
    gradients = teacher.gradients_at(seen.stream, seen.stream.blocks, torch.arange(8))
    for probe in range(DRAWS):
        by_logits = (signs_of(seen, probe) * (logprobs / 2).exp() * changed).sum(-1)
        by_states = (gradients[probe] * change).sum(-1)
        torch.testing.assert_close(by_states, by_logits, rtol=0.05, atol=1e-4)  # gradients are kept in bfloat16
