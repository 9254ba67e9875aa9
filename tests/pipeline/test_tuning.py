"""Tuning after the assignment: the same widths and bytes, closer to the original, or nothing is changed."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.errors import ContractError, InputError, StoppedError
from allocator.contract.manifest import Manifest
from allocator.pipeline import (
    CandidateSettings,
    FitRequest,
    SolveSettings,
    export,
    fit,
    learn,
    solve_scores,
)
from allocator.pipeline.tuning import TUNED_MANIFEST, TuneRequest, tune
from allocator.quantize import BankReader
from allocator.run.journal import Journal
from allocator.score import LearningSettings

CANDIDATES = CandidateSettings("rtn", (2, 3, 8), 32, sequences=4, sequence_length=32)
SETTINGS = "learned-rounding:iterations=60,learning_rate=0.02,draws=1"


@dataclass(frozen=True)
class Solved:
    model: Path
    bank: Path
    text: Path
    manifest: Manifest

    def request(self, out: Path, quantizer: str = SETTINGS, scale_steps: int = 3) -> TuneRequest:
        return TuneRequest(
            self.manifest, self.model, self.bank, [self.text], out, 24, 48, quantizer=quantizer, scale_steps=scale_steps
        )


@pytest.fixture(scope="module")
def solved(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Solved:
    folder, model = tmp_path_factory.mktemp("tuning"), tiny_model("qwen3")
    # Of few words, so that little text says much about other text.
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=9000)))
    learned = learn(model, folder / "work", CANDIDATES, LearningSettings(method="uniform"))
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=4.5))
    return Solved(model, learned.bank_folder, folder / "text.txt", manifest)


def test_tuned_candidates_are_closer_in_the_same_bytes(solved: Solved, tmp_path: Path) -> None:
    found = tune(solved.request(tmp_path / "out"))
    assert found.tuning is not None
    assert found.tuning.kept == "tuned"
    assert found.tuning.kl < 0.95 * found.tuning.kl_before
    assert (found.modules, found.tensor_bytes) == (solved.manifest.modules, solved.manifest.tensor_bytes)
    assert found.tuning.bank_digest == solved.manifest.bank_digest != found.bank_digest
    assert Manifest.read(tmp_path / "out" / TUNED_MANIFEST) == found
    export(found, solved.model, tmp_path / "out" / "bank", tmp_path / "checkpoint")
    check_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ContractError, match="solved for bank"):
        export(found, solved.model, solved.bank, tmp_path / "other")


def test_what_is_no_better_is_not_kept(solved: Solved, tmp_path: Path) -> None:
    still = "learned-rounding:iterations=1,learning_rate=0,scale_learning_rate=0,draws=1"
    found = tune(solved.request(tmp_path / "out", still, scale_steps=0))
    assert found.tuning is not None
    assert (found.tuning.kept, found.bank_digest) == ("candidates", solved.manifest.bank_digest)
    assert (found.tuning.kl, found.tuning.kl_blocks) == (found.tuning.kl_before, None)


def test_scales_alone_bring_more_through_the_whole_model(solved: Solved, tmp_path: Path) -> None:
    still = "learned-rounding:iterations=1,learning_rate=0,scale_learning_rate=0,draws=1"
    found = tune(solved.request(tmp_path / "out", still, scale_steps=8))
    assert found.tuning is not None
    assert found.tuning.kept == "tuned"
    assert found.tuning.kl_blocks is not None
    assert found.tuning.kl < 0.99 * found.tuning.kl_blocks
    before, after = (BankReader(folder) for folder in (solved.bank, tmp_path / "out" / "bank"))
    for name, form in found.modules.items():
        if form.quantized:
            was, now = (bank.tensors(name, form) for bank in (before, after))
            assert {part for part in was if not was[part].equal(now[part])} <= {"weight_scale"}
    assert tune(solved.request(tmp_path / "out", still, scale_steps=8)) == found


def test_tuning_does_not_delete_what_was_learned(solved: Solved) -> None:
    before = BankReader(solved.bank).bank.digest
    with pytest.raises(InputError, match="holds what was learned, and this would be what was tuned"):
        tune(solved.request(solved.bank.parent))
    assert BankReader(solved.bank).bank.digest == before
    assert (solved.bank.parent / "scores.json").exists()


def test_a_tuning_that_is_stopped_ends_in_the_same_bytes(
    solved: Solved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = "learned-rounding:iterations=4,draws=1"
    whole = tune(solved.request(tmp_path / "whole", quick))
    saved, left = Journal.save, [0]

    def save(self: Journal, step: str, state: object, may_stop: bool = True) -> None:
        saved(self, step, state, may_stop)
        left[0] -= 1
        if left[0] == 0:
            raise StoppedError("stopped")

    monkeypatch.setattr(Journal, "save", save)
    for _ in range(30):
        left[0] = 2
        try:
            parts = tune(solved.request(tmp_path / "parts", quick))
            break
        except StoppedError:
            continue
    assert parts == whole
    digests = [BankReader(tmp_path / name / "bank").bank.digest for name in ("whole", "parts")]
    assert digests[0] == digests[1]
    assert not (tmp_path / "parts" / "hidden").exists()


def test_fit_tunes_and_exports_the_better_candidates(solved: Solved, tmp_path: Path) -> None:
    found = fit(
        FitRequest(
            model=str(solved.model),
            out=tmp_path / "out",
            work=tmp_path / "work",
            solving=SolveSettings(average_bits=4.5),
            candidates=replace(CANDIDATES, calibration=[solved.text], sequences=24, sequence_length=48),
            learning=LearningSettings(method="uniform"),
            tuned=True,
        )
    )
    tuning = found.manifest.tuning
    assert tuning is not None
    assert (tuning.kept == "tuned") == (tuning.kl < tuning.kl_before)
    check_checkpoint(tmp_path / "out")
    assert Manifest.read(tmp_path / "out" / "gamma_manifest.json") == found.manifest


def test_a_quantizer_that_does_not_learn_and_another_bank_are_refused(solved: Solved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes learned-rounding"):
        tune(solved.request(tmp_path / "out", "gptq"))
    other = solved.manifest.model_copy(update={"bank_digest": "sha256:" + "0" * 64})
    with pytest.raises(ContractError, match="give its own"):
        tune(replace(solved.request(tmp_path / "out"), manifest=other))
