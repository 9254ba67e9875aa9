"""What `gamma kv` and `gamma sweep --measure` call: losses measured on text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.bank import BANK_NAME, Bank
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import KV_CACHE_NAME, KvCacheScores, Scores
from allocator.pipeline.model_folder import digest_of_model, reference_to, work_folder_at
from allocator.pipeline.settings import CandidateSettings
from allocator.run.progress import Progress, silent

__all__ = ["KL_UNIT", "MeasureSettings", "TextSettings", "kv_scores_of", "measure_assignments", "measure_kv_losses"]

KL_UNIT = "nats of KL divergence a token"
_MEASURED_DTYPES = ("fp8",)
_KV_SEQUENCES, _KV_SEQUENCE_LENGTH = 16, 512


@dataclass(frozen=True)
class TextSettings:
    """`sequences` windows of `sequence_length` tokens (at most what the model allows), drawn by `seed` from `files`;
    without files the model writes its own text."""

    files: Sequence[Path] | None
    sequences: int
    sequence_length: int
    seed: int


@dataclass(frozen=True)
class MeasureSettings:
    """A model folder, the bank of its candidates, and text from files that was not calibrated on."""

    model: Path
    bank: Path
    text: TextSettings


def measure_assignments(
    scores: Scores,
    assignments: Mapping[str, Mapping[str, ModuleFormat]],
    settings: MeasureSettings,
    progress: Progress = silent,
) -> dict[str, float]:
    """KL divergence from the original model (nats a token) of each of `assignments`, by their keys.

    Raises ContractError when the bank is not the one of the scores, InputError for text that is too short.
    """
    from allocator.evaluate import open_student

    bank = Bank.read(settings.bank / BANK_NAME)
    if bank.digest != scores.bank_digest:
        raise ContractError(
            f"{settings.bank}: digest {bank.digest}, the scores are of {scores.bank_digest}; give their bank"
        )
    progress.begin("text")
    text = settings.text
    student = open_student(
        settings.model, settings.bank, list(text.files or ()), text.sequences, text.sequence_length, text.seed
    )
    return {
        key: float(student.losses(assignment).kl.mean())
        for key, assignment in progress.over(assignments.items(), "measuring", "assignment")
    }


def measure_kv_losses(
    model: Path, text: TextSettings, work: Path | None = None, progress: Progress = silent
) -> KvCacheScores:
    """What an fp8 KV cache costs `model` on `text`. Raises InputError.

    `work` is a work folder that may remember the model's digest.
    """
    from allocator.blocks.calibration import calibration_from_model, calibration_from_text
    from allocator.evaluate.fp8_kv_cache import measure_kv_cache
    from allocator.model import read_inventory

    inventory = read_inventory(model)
    digest = digest_of_model(inventory, None if work is None else work_folder_at(work), progress)
    reference = reference_to(inventory, digest)
    length = inventory.sequence_length(text.sequence_length)
    if text.files is None:
        calibration = calibration_from_model(model, text.sequences, length, text.seed, progress)
    else:
        progress.begin("text")
        calibration = calibration_from_text(model, list(text.files), text.sequences, length, text.seed)
    losses = {}
    for dtype in progress.over(_MEASURED_DTYPES, "KV cache", "dtype"):
        found = measure_kv_cache(model, calibration.token_ids, dtype, progress=progress)
        losses[dtype] = found.kl
    return KvCacheScores(
        model=reference, unit=KL_UNIT, calibration_digest=calibration.digest, tokens=found.tokens, losses=losses
    )


def kv_scores_of(
    model: Path, work: Path, scores: Scores, candidates: CandidateSettings, progress: Progress = silent
) -> KvCacheScores:
    """The losses of the KV cache in the work folder, measured on the calibration text if they are not there yet."""
    path = work / KV_CACHE_NAME
    try:
        known = KvCacheScores.read(path)
        if known.model.digest == scores.model.digest:
            return known
    except ContractError:
        pass  # absent or damaged: measured
    from allocator.model import read_inventory

    sequences, length = candidates.amount(read_inventory(model))
    count, length = min(sequences, _KV_SEQUENCES), min(length, _KV_SEQUENCE_LENGTH)
    text = TextSettings(candidates.calibration, count, length, candidates.seed)
    measured = measure_kv_losses(model, text, work, progress)
    measured.write(path)
    return measured
