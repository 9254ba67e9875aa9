"""What `gamma kv` and `gamma sweep --measure` call: losses measured on text, with the models in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.bank import ModelReference
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import KV_CACHE_NAME, KvCacheScores, Scores
from allocator.pipeline.model_folder import digest_of_model, work_folder_at
from allocator.pipeline.settings import CandidateSettings
from allocator.run.progress import Progress, silent

__all__ = ["KL_UNIT", "MeasureSettings", "kv_scores_of", "measure_assignments", "measure_kv_losses"]

KL_UNIT = "nats of KL divergence a token"
_MEASURED_DTYPES = ("fp8",)
_KV_SEQUENCES, _KV_SEQUENCE_LENGTH = 16, 512


@dataclass(frozen=True)
class MeasureSettings:
    """A model folder, the bank of its candidates, and text that was not calibrated on."""

    model: Path
    bank: Path
    text: Sequence[Path]
    sequences: int = 32
    sequence_length: int = 512
    seed: int = 1


def measure_assignments(
    scores: Scores,
    assignments: Mapping[str, Mapping[str, ModuleFormat]],
    settings: MeasureSettings,
    progress: Progress = silent,
) -> dict[str, float]:
    """KL divergence from the original model (nats a token) of each of `assignments`, by their keys.

    Raises ContractError when the bank is not the one of the scores, InputError for text that is too short.
    """
    from allocator.calibration.sequences import calibration_from_text
    from allocator.evaluate.assignments import AssignmentMeter
    from allocator.model import read_inventory
    from allocator.quantize import BankReader

    bank = BankReader(settings.bank)
    if bank.bank.digest != scores.bank_digest:
        raise ContractError(
            f"{settings.bank}: digest {bank.bank.digest}, the scores are of {scores.bank_digest}; give their bank"
        )
    length = read_inventory(settings.model).sequence_length(settings.sequence_length)
    progress.begin("text")
    text = calibration_from_text(settings.model, list(settings.text), settings.sequences, length, settings.seed)
    meter = AssignmentMeter(settings.model, bank, text.token_ids)
    found = {}
    for key, assignment in progress.over(assignments.items(), "measuring", "assignment"):
        found[key] = meter.measure(assignment).kl
    return found


def measure_kv_losses(
    model: Path,
    text: Sequence[Path] | None,
    sequences: int,
    sequence_length: int,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress = silent,
) -> KvCacheScores:
    """What an fp8 KV cache costs `model` on `text` (None: text that the model writes). Raises InputError.

    `work` is a work folder that may remember the model's digest.
    """
    from allocator.calibration.sequences import calibration_from_model, calibration_from_text
    from allocator.evaluate.fp8_kv_cache import measure_kv_cache
    from allocator.model import read_inventory

    inventory = read_inventory(model)
    digest = digest_of_model(inventory, None if work is None else work_folder_at(work), progress)
    reference = ModelReference(
        name=model.resolve().name,
        architecture=inventory.architecture,
        digest=digest,
    )
    length = inventory.sequence_length(sequence_length)
    if text is None:
        calibration = calibration_from_model(model, sequences, length, seed, progress)
    else:
        progress.begin("text")
        calibration = calibration_from_text(model, list(text), sequences, length, seed)
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
    measured = measure_kv_losses(model, candidates.calibration, count, length, candidates.seed, work, progress)
    measured.write(path)
    return measured
