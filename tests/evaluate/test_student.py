"""A student's divergence is that of the whole model, and its gradients are what small steps do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.blocks import BlockStream
from allocator.evaluate import Student, measure_gradients
from allocator.model import read_inventory
from allocator.pipeline import CandidateSettings, learn
from allocator.quantize import BankReader
from allocator.score import LearningSettings

TOKENS = torch.randint(0, 320, (6, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def student(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Student:
    candidates = CandidateSettings(quantizer="rtn", group_size=32, sequences=4, sequence_length=32)
    learned = learn(tiny_model("qwen3"), tmp_path_factory.mktemp("work"), candidates, LearningSettings(draws=1))
    inventory = read_inventory(tiny_model("qwen3"))
    return Student(BlockStream(inventory), BankReader(learned.bank_folder), TOKENS)


def assignment(student: Student, *bits: int) -> dict:
    """These widths in turn over the modules."""
    found = {}
    for i, (name, module) in enumerate(student.bank.bank.modules.items()):
        found[name] = next(f for f in module.candidates if f.num_bits == bits[i % len(bits)])
    return found


def test_losses_are_those_of_the_whole_model(student: Student, tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"), dtype=torch.float32)
    plan = assignment(student, 2, 4, 8)
    with torch.inference_mode():
        p = model(TOKENS).logits[:, :-1].double().log_softmax(-1)
        for name, form in plan.items():
            model.get_parameter(f"{name}.weight").data.copy_(student.bank.dequantized(name, form))
        q = model(TOKENS).logits[:, :-1].double().log_softmax(-1)
    losses = student.losses(plan)
    torch.testing.assert_close(losses.kl, (p.exp() * (p - q)).sum(-1).mean(-1), rtol=1e-4, atol=1e-6)
    nll = -q.gather(-1, TOKENS[:, 1:].unsqueeze(-1)).squeeze(-1).mean(-1)
    torch.testing.assert_close(losses.nll, nll, rtol=1e-4, atol=1e-6)


def test_kept_states_and_chosen_rows_change_nothing(student: Student) -> None:
    plan, other = assignment(student, 3, 4), assignment(student, 3, 4)
    last = list(other)[-1]
    other[last] = assignment(student, 2)[last]
    fresh = student.losses(other).kl
    student.losses(plan, keep=True)
    torch.testing.assert_close(student.losses(other).kl, fresh)
    torch.testing.assert_close(student.losses(other, rows=torch.tensor([4, 1])).kl, fresh[[4, 1]])
    torch.testing.assert_close(student.for_tokens(TOKENS[2:]).losses(other).kl, fresh[2:])


def test_the_original_diverges_by_nothing(student: Student) -> None:
    assert float(student.losses({}).kl.abs().max()) < 1e-6


@pytest.mark.parametrize("place", ["in a block", "one module at both ends"])
def test_slopes_are_what_a_small_step_does(student: Student, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towards each candidate of one module, a hundredth of the way."""
    student, plan = student.for_tokens(TOKENS), assignment(student, 3, 4)
    gradients = measure_gradients(student, plan)
    torch.testing.assert_close(gradients.losses.kl, student.losses(plan).kl)
    name, local, index = "model.layers.1.mlp.up_proj", "mlp.up_proj", 1
    _, candidates = student.block(index)
    if place == "one module at both ends":
        name = local = "model.embed_tokens"
        candidates = student.vocabulary
    here = candidates.formats[local].index(plan[name])
    weight = candidates.weight
    base = weight(local, here).clone()
    for other in (here - 1, here + 1, len(candidates.formats[local]) - 1):
        step = weight(local, other) - base
        losses = []
        for sign in (1, -1):
            moved = base + sign * 0.01 * step
            with monkeypatch.context() as patch:
                patch.setattr(
                    candidates, "weight", lambda *of, moved=moved: moved if of == (local, here) else weight(*of)
                )
                losses.append(float(student.losses(plan).kl.mean()))
        measured = (losses[0] - losses[1]) / 0.02
        predicted = float(gradients.along[name][other] - gradients.along[name][here])
        assert predicted == pytest.approx(measured, rel=0.05, abs=1e-5)
