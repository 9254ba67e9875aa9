"""What `gamma tune` calls: the chosen candidates learned anew together, and kept if they measure better."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import Calibration
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.side_states import state_width
from allocator.contract.bank import BANK_NAME, Bank
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
from allocator.quantize.scale_tuning import tune_scales
from allocator.quantize.tuning import tune_bank
from allocator.run.progress import Progress, silent
from allocator.run.work_folder import Resume, RunFingerprint, WorkFolder, versions

__all__ = ["SCALE_STEPS", "TUNED_MANIFEST", "TuneRequest", "tune"]

TUNED_MANIFEST = "manifest.json"
SCALE_STEPS = 32
"""Of the scales through the whole model, each on 32 sequences."""

_SELECTION_SEQUENCES = 32
_BLOCKS, _LOSSES = "blocks", "losses"


@dataclass(frozen=True)
class TuneRequest:
    """bank: that of `manifest`; text: files to tune on (None: what learning takes without any), in `sequences` of
    `sequence_length` (None: as in learning); 32 more windows are measured on. out: the folder of the tuned bank and
    manifest. scale_steps: of the scales through the whole model, after the blocks (0: none)."""

    manifest: Manifest
    model: Path
    bank: Path
    text: Sequence[Path] | None
    out: Path
    sequences: int | None = None
    sequence_length: int | None = None
    seed: int = 1
    quantizer: str = "learned-rounding"
    scale_steps: int = SCALE_STEPS
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
        if folder.finished_bank() is not None and not (request.out / _BLOCKS).exists():
            folder.finish()
            return Manifest.read(request.out / TUNED_MANIFEST)
        run = _run(arranged, text, folder, progress)
        found = _tuned(request, _Candidates(manifest, bank, quantizer), run, selection, folder)
        make_servable(inventory, folder.bank)
        found.write(request.out / TUNED_MANIFEST)
        shutil.rmtree(request.out / _BLOCKS)
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
        learning={"scale_steps": request.scale_steps},
        environment=versions() | {"device": compute_device(), "threads": torch.get_num_threads()},
    )  # fmt: skip


def _run(inventory: Inventory, text: Calibration, folder: WorkFolder, progress: Progress) -> CalibrationRun:
    sequences, length = text.token_ids.shape
    hidden = HiddenStates(folder.hidden, sequences, length, state_width(inventory))
    return CalibrationRun(BlockStream(inventory, compute_device()), text, hidden, progress, folder.journal)


@dataclass(frozen=True)
class _Candidates:
    manifest: Manifest
    bank: BankReader
    quantizer: LearnedRounding


def _tuned(
    request: TuneRequest, given: _Candidates, run: CalibrationRun, selection: torch.Tensor, folder: WorkFolder
) -> Manifest:
    """Tune block by block, then the scales; `folder.bank` has the better of both in the end."""
    manifest, by_blocks = given.manifest, request.out / _BLOCKS
    done = run.journal.section("rounding")
    if done.load(_BLOCKS) is None:
        run.fill()
        tune_bank(run, given.bank, manifest.modules, given.quantizer, by_blocks)
        done.save(_BLOCKS, True)
    banks = [given.bank, BankReader(by_blocks)]
    if request.scale_steps:
        run.fill()
        tune_scales(run, banks[-1], manifest.modules, request.scale_steps, folder.bank)
        banks.append(BankReader(folder.bank))
    losses = run.journal.section("learning").once(_LOSSES, lambda: _losses(run, banks, manifest, selection))
    best = losses.index(min(losses))
    if best < 2:
        _put(by_blocks, folder.bank)
    tuning = Tuning(
        bank_digest=given.bank.bank.digest,
        text_digest=run.calibration.digest,
        tokens=run.token_ids.numel(),
        kl_before=losses[0],
        kl=losses[-1],
        kl_blocks=losses[1] if request.scale_steps else None,
        kept="candidates" if best == 0 else "tuned" if best == len(losses) - 1 else "blocks",
    )
    changes = {"tuning": tuning} | ({"bank_digest": Bank.read(folder.bank / BANK_NAME).digest} if best else {})
    return manifest.model_copy(update=changes)


def _put(bank: Path, target: Path) -> None:
    """Copy a bank; `bank.json` last."""
    target.mkdir(exist_ok=True)
    for path in sorted(bank.iterdir(), key=lambda path: path.name == BANK_NAME):
        temporary = target / f".{path.name}"
        shutil.copy(path, temporary)
        temporary.replace(target / path.name)


def _losses(run: CalibrationRun, banks: list[BankReader], manifest: Manifest, selection: torch.Tensor) -> list[float]:
    """KL of the assignment with the candidates of each bank."""
    losses = []
    for reader in run.progress.over(banks, "measuring", "bank"):
        student = Student(run.stream, reader, selection)
        losses.append(float(student.losses(manifest.modules).kl.mean()))
    return losses
