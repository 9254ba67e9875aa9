"""What `gamma tune` calls: the chosen candidates learned anew together, and kept if they measure better."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import Calibration
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.hidden_states import HiddenStates
from allocator.contract.bank import Bank
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest, Tuning
from allocator.contract.outputs import check_output_folder, naming_lack_of_room
from allocator.evaluate import Student
from allocator.model import Inventory, read_inventory
from allocator.pipeline.calibration_text import calibration_text
from allocator.pipeline.learning import compute_device
from allocator.pipeline.model_folder import digest_of_model, work_folder_at
from allocator.pipeline.settings import CandidateSettings
from allocator.quantize import BankReader, LearnedRounding, get_quantizer, make_servable
from allocator.quantize.tuning import tune_bank
from allocator.run.progress import Progress, silent
from allocator.run.work_folder import Resume, RunFingerprint, WorkFolder, versions

__all__ = ["TUNED_MANIFEST", "TuneRequest", "tune"]

TUNED_MANIFEST = "manifest.json"

_SELECTION_SEQUENCES = 32


@dataclass(frozen=True)
class TuneRequest:
    """bank: that of `manifest`; text: files to tune on (None: what learning takes without any), in `sequences` of
    `sequence_length` (None: as in learning); 32 more windows are measured on. out: the folder of the tuned bank and
    manifest."""

    manifest: Manifest
    model: Path
    bank: Path
    text: Sequence[Path] | None
    out: Path
    sequences: int | None = None
    sequence_length: int | None = None
    seed: int = 1
    quantizer: str = "learned-rounding"
    resume: Resume = "auto"


def tune(request: TuneRequest, progress: Progress = silent) -> Manifest:
    """Write the tuned bank into `request.out`, and the manifest of it, or of the bank as it was if that is better on
    text that was not tuned on. Widths and bytes stay. A run that was stopped goes on where it stood.

    Raises InputError for a quantizer that does not learn and for too little text, ContractError for a bank or a model
    of another manifest.
    """
    manifest, quantizer = request.manifest, get_quantizer(request.quantizer)
    if not isinstance(quantizer, LearnedRounding):
        raise InputError(f"--quantizer {request.quantizer}: does not learn; tuning takes learned-rounding")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("tuning goes through the blocks in order, in one process; run it without torchrun")
    check_output_folder(request.out)
    inventory, bank = read_inventory(request.model), BankReader(request.bank)
    digest = digest_of_model(inventory, work_folder_at(request.bank.parent), progress)
    _check_belongs(manifest, digest, bank, request)
    arranged = bank.arranged(inventory)
    with naming_lack_of_room(request.out, "What was finished is kept"):
        request.out.mkdir(parents=True, exist_ok=True)
        text, selection = _texts(request, inventory, progress)
        folder = WorkFolder(request.out)
        folder.begin(_fingerprint(request, text, quantizer.name), request.resume)
        run = _run(arranged, text, folder, progress)
        tuned = folder.finished_bank()
        if tuned is None:
            run.fill()
            tuned = tune_bank(run, bank, manifest.modules, quantizer, folder.bank)
            make_servable(inventory, folder.bank)
        found = _measured(manifest, bank, tuned, run, selection, folder, progress)
        found.write(request.out / TUNED_MANIFEST)
        folder.finish()
    return found


def _check_belongs(manifest: Manifest, digest: str, bank: BankReader, request: TuneRequest) -> None:
    if manifest.model.digest != digest:
        raise ContractError(f"the manifest is of model {manifest.model.digest}, {request.model} is {digest}")
    if manifest.bank_digest != bank.bank.digest:
        raise ContractError(
            f"the manifest is of bank {manifest.bank_digest}, {request.bank} is {bank.bank.digest}; give its own"
        )


def _texts(request: TuneRequest, inventory: Inventory, progress: Progress) -> tuple[Calibration, torch.Tensor]:
    """What is tuned on, and what is measured on: windows without a token in common."""
    settings = CandidateSettings(
        calibration=request.text, sequences=request.sequences, sequence_length=request.sequence_length,
        seed=request.seed,
    )  # fmt: skip
    sequences, length = settings.amount(inventory)
    total = sequences + min(sequences, _SELECTION_SEQUENCES)
    drawn = calibration_text(inventory, replace(settings, sequences=total, sequence_length=length), progress)
    return replace(drawn, token_ids=drawn.token_ids[:sequences]), drawn.token_ids[sequences:]


def _fingerprint(request: TuneRequest, text: Calibration, quantizer: str) -> RunFingerprint:
    sequences, length = text.token_ids.shape
    return RunFingerprint(
        model=request.manifest.model,
        calibration={
            "source": text.source, "digest": text.digest, "sequences": sequences, "sequence_length": length
        },
        candidates={"manifest": request.manifest.digest, "quantizer": quantizer},
        learning={},
        environment=versions() | {"device": compute_device(), "threads": torch.get_num_threads()},
    )  # fmt: skip


def _run(inventory: Inventory, text: Calibration, folder: WorkFolder, progress: Progress) -> CalibrationRun:
    sequences, length = text.token_ids.shape
    hidden = HiddenStates(folder.hidden, sequences, length, inventory.shape.hidden_size)
    return CalibrationRun(BlockStream(inventory, compute_device()), text, hidden, progress, folder.journal)


def _measured(
    manifest: Manifest,
    bank: BankReader,
    tuned: Bank,
    run: CalibrationRun,
    selection: torch.Tensor,
    folder: WorkFolder,
    progress: Progress,
) -> Manifest:
    losses = []
    for reader in progress.over([bank, BankReader(folder.bank)], "measuring", "bank"):
        student = Student(run.stream, reader, selection)
        losses.append(float(student.losses(manifest.modules).kl.mean()))
    better = losses[1] < losses[0]
    tuning = Tuning(
        bank_digest=bank.bank.digest,
        text_digest=run.calibration.digest,
        tokens=run.token_ids.numel(),
        kl_before=losses[0],
        kl=losses[1],
        kept="tuned" if better else "candidates",
    )
    changes = {"tuning": tuning} | ({"bank_digest": tuned.digest} if better else {})
    return manifest.model_copy(update=changes)
