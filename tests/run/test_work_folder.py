"""The fingerprint of the run in a work folder alone decides what is used again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from allocator.contract.bank import Bank
from allocator.contract.errors import InputError
from allocator.pipeline import CandidateSettings, LearnResult, learn
from allocator.run.progress import Progress
from allocator.run.work_folder import RunFingerprint
from allocator.score import LearningSettings
from tests.watching import Watching

LEARNING = LearningSettings(draws=1)
TEXT = "the quick brown fox jumps over the lazy dog " * 200


class KilledError(Exception):
    pass


def killed_in(what: str, share: float) -> Progress:
    """Ends the work when so much of the step `what` is done."""

    def see(step: str, done: float) -> None:
        if step == what and done >= share:
            raise KilledError

    return Watching(see)


class Work:
    """A small model, a text, and settings; `learn` in one work folder again and again."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.text = model, folder / "work", folder / "text.txt"
        self.text.write_text(TEXT)
        self.candidates = CandidateSettings(
            quantizer="rtn", widths=(2, 4), group_size=32, calibration=[self.text], sequences=4, sequence_length=32
        )

    def learn(self, learning: LearningSettings = LEARNING, **changes: object) -> LearnResult:
        return learn(self.model, self.folder, replace(self.candidates, **changes), learning)  # type: ignore[arg-type]

    def killed(self, progress: Progress, **changes: object) -> None:
        with pytest.raises(KilledError):
            learn(self.model, self.folder, replace(self.candidates, **changes), LEARNING, progress)  # type: ignore[arg-type]


@pytest.fixture
def work(tiny_model: Callable[[str], Path], tmp_path: Path) -> Work:
    return Work(tiny_model("llama"), tmp_path)


def test_what_differs_undoes_what_depends_on_it_and_no_more(work: Work) -> None:
    first = work.learn()
    assert first.reused == []
    assert work.learn().reused == ["bank", "scores"]
    renamed = work.text.rename(work.text.with_name("renamed.txt"))  # the same tokens
    assert work.learn(calibration=[renamed]).reused == ["bank", "scores"]
    assert work.learn(replace(LEARNING, seed=1), calibration=[renamed]).reused == ["bank"]
    renamed.write_text(TEXT.upper())
    assert work.learn(replace(LEARNING, seed=1), calibration=[renamed]).reused == []
    renamed.write_text(TEXT)
    again = work.learn(calibration=[renamed])
    assert (again.reused, again.scores.digest) == ([], first.scores.digest)


def test_another_environment_undoes_nothing(work: Work) -> None:
    work.learn()
    path = work.folder / "run.json"
    run = RunFingerprint.read(path)
    run.model_copy(update={"environment": run.environment | {"torch": "1.0"}}).write(path)
    assert work.learn().reused == ["bank", "scores"]
    assert RunFingerprint.read(path) == run


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_without_a_valid_fingerprint_there_is_nothing_to_use_again(
    work: Work, damage: Callable[[Path], object]
) -> None:
    first = work.learn()
    damage(work.folder / "run.json")
    again = work.learn()
    assert (again.reused, again.scores.digest) == ([], first.scores.digest)


def test_the_work_of_another_model_is_not_deleted_by_a_mistyped_folder(
    work: Work, tiny_model: Callable[[str], Path]
) -> None:
    """Nor where only scores or bank say whose it is."""
    first, other = work.learn(), tiny_model("qwen3")
    for lost in ("", "run.json", "scores.json"):
        (work.folder / (lost or "none")).unlink(missing_ok=True)
        before = {
            path: path.read_bytes() for path in work.folder.rglob("*") if path.suffix in (".json", ".safetensors")
        }
        before.pop(work.folder / "model-digest.json")  # of the model that was read last
        for resume in ("auto", "must"):
            with pytest.raises(InputError, match="give another folder, or --resume never") as refused:
                learn(other, work.folder, work.candidates, LEARNING, resume=resume)  # type: ignore[arg-type]
            assert f"holds the work of {work.model.name} ({first.model_digest})" in str(refused.value)
            assert f"this is {other.name} (sha256:" in str(refused.value)
        assert before.items() <= {p: p.read_bytes() for p in work.folder.rglob("*") if p.is_file()}.items()
    assert learn(other, work.folder, work.candidates, LEARNING, resume="never").scores.model.name == other.name


def test_scores_of_a_bank_that_is_lost_are_lost_with_it(work: Work) -> None:
    first = work.learn()
    (work.folder / "bank" / "bank.json").unlink()
    work.killed(killed_in("candidates", 0.5))
    assert not (work.folder / "scores.json").exists()
    again = work.learn()
    assert (again.reused, again.scores.digest) == ([], first.scores.digest)


def test_results_of_other_settings_are_not_taken_for_finished_after_a_kill(work: Work) -> None:
    work.learn()
    work.killed(killed_in("candidates", 0.5), symmetric=True)
    again = work.learn(symmetric=True)
    assert again.reused == []
    assert Bank.read(again.bank_folder / "bank.json").symmetric
    assert again.scores.bank_digest == Bank.read(again.bank_folder / "bank.json").digest


def test_orders_for_other_channel_blocks_are_not_taken_after_a_kill(work: Work, tmp_path: Path) -> None:
    work.killed(killed_in("channels", 0.5), channel_blocks=4)
    found = work.learn(channel_blocks=8)
    assert found.scores.channel_blocks is not None
    anew = learn(work.model, tmp_path / "anew", replace(work.candidates, channel_blocks=8), LEARNING)
    assert found.scores.digest == anew.scores.digest
