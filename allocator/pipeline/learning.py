"""From a model to its bank and scores (stage I), in stages of which each begins where an earlier run has stopped."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import Calibration
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.calibration.sequences import FULL_FROM_PARAMETERS
from allocator.blocks.hf_model import open_config, open_tokenizer
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.side_states import state_width
from allocator.contract.bank import Bank, ModelReference
from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.outputs import check_output_folder, naming_lack_of_room
from allocator.contract.scores import Scores
from allocator.model import Inventory, read_inventory
from allocator.pipeline.calibration_text import calibration_text, told_amount
from allocator.pipeline.model_folder import digest_of_model, reference_to
from allocator.pipeline.room import bank_bytes, check_room, learning_bytes
from allocator.pipeline.settings import CandidateSettings
from allocator.quantize import (
    BankReader,
    LearnedRounding,
    Quantizer,
    build_bank,
    get_quantizer,
    in_order,
    make_servable,
)
from allocator.run.process_group import process_group_from_environment
from allocator.run.progress import Progress, silent
from allocator.run.work_folder import Resume, RunFingerprint, WorkFolder, versions
from allocator.score import LearningSettings, learn_scores
from allocator.score.steps import learning_steps

__all__ = ["LearnResult", "compute_device", "learn"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnResult:
    """model_digest is that of the model as it was read; reused says which of bank and scores were already there."""

    model_digest: str
    scores: Scores
    scores_path: Path
    bank_folder: Path
    reused: list[str] = field(default_factory=list)


def learn(
    model: Path,
    work: Path,
    candidates: CandidateSettings,
    learning: LearningSettings,
    progress: Progress = silent,
    resume: Resume = "auto",
) -> LearnResult:
    """Build the bank and learn the scores of `model` in the folder `work`; what is there and fits is used again.

    A run that was stopped or killed goes on from its last finished step (see `WorkFolder.begin` for `resume`). Under
    torchrun the processes share the calibration sequences. Raises InputError before the work if `work` cannot be
    written, or its disk has too little room; also when the disk is full after all: what is finished is kept.
    """
    check_output_folder(work)
    for inside in (work / "bank", work / "hidden", work / "journal"):
        if inside.exists():
            check_output_folder(inside)
    with naming_lack_of_room(work, "What was finished is kept"):
        task = _checked(model, candidates, learning)
        return _learn(task, _opened(task, work), progress, resume)


@dataclass(frozen=True)
class _Task:
    """What is asked for, and what follows from it: the candidates below 16 bits of each module, and the amount of
    calibration text."""

    inventory: Inventory
    candidates: CandidateSettings
    learning: LearningSettings
    quantizer: Quantizer
    formats: dict[str, list[ModuleFormat]]
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def rounding(self) -> LearnedRounding | None:
        """The quantizer, if it is one that learns."""
        return self.quantizer if isinstance(self.quantizer, LearnedRounding) else None

    @property
    def needed_bytes(self) -> int:
        """Of the work folder at its fullest."""
        draws = max(self.learning.draws, 0 if self.rounding is None else self.rounding.draws)
        learning = replace(self.learning, draws=draws)
        learned = learning_bytes(self.inventory, self.formats, self.tokens, learning)
        return bank_bytes(self.inventory, self.formats) + learned


def _checked(model: Path, candidates: CandidateSettings, learning: LearningSettings) -> _Task:
    """Whatever can be wrong with the model or the settings is found here, before the weights are read."""
    inventory = read_inventory(model)
    for line in inventory.told():
        _LOG.warning("%s: %s", model, line)
    quantizer = get_quantizer(candidates.quantizer)
    formats = candidates.formats.of(candidates.cut(inventory))
    if not any(formats.values()):
        raise InputError(f"{model}: nothing can be quantized; `gamma inspect` shows why")
    open_config(model)
    if candidates.calibration is not None:
        open_tokenizer(model)
    return _Task(inventory, candidates, learning, quantizer, formats, *candidates.amount(inventory))


def _opened(task: _Task, work: Path) -> WorkFolder:
    folder = WorkFolder(work, process_group_from_environment())
    work.mkdir(parents=True, exist_ok=True)
    if not folder.scores.exists():  # else there may be nothing to do, which is known only later
        check_room(folder, task.needed_bytes)
    return folder


def _learn(task: _Task, folder: WorkFolder, progress: Progress, resume: Resume) -> LearnResult:
    inventory, group = task.inventory, folder.process_group
    digest = group.from_leader(lambda: digest_of_model(inventory, folder.folder, progress))
    reference = reference_to(inventory, digest)
    _LOG.info("calibration: %s", told_amount(inventory, task.candidates))
    calibration = group.from_leader(lambda: calibration_text(inventory, task.candidates, progress))
    folder.begin(_fingerprint(task, reference, calibration), resume)
    if group.leads:
        make_servable(inventory, folder.bank)
    bank, scores = folder.finished_bank(), folder.finished_scores()
    reused = [name for name, found in (("bank", bank), ("scores", scores)) if found is not None]
    if bank is None or scores is None:
        run = _prepared(task, folder, calibration, bank, progress)
        if bank is None:
            build_bank(run, reference, task.quantizer, task.candidates.formats, folder.bank)
        else:
            run.fill()
        scores = _scored(task, run, folder)
    folder.finish()
    return LearnResult(digest, scores, folder.scores, folder.bank, reused)


def _fingerprint(task: _Task, reference: ModelReference, calibration: Calibration) -> RunFingerprint:
    return RunFingerprint(
        model=reference,
        calibration={
            "source": calibration.source,
            "digest": calibration.digest,
            "sequences": task.sequences,
            "sequence_length": task.length,
        },
        candidates=task.candidates.recorded(task.quantizer.name),
        learning=asdict(task.learning),
        environment=versions() | {"device": compute_device(), "threads": torch.get_num_threads()},
    )


def _prepared(
    task: _Task, folder: WorkFolder, calibration: Calibration, bank: Bank | None, progress: Progress
) -> CalibrationRun:
    """The model on its text, its modules as the candidates are of them."""
    check_room(folder, task.needed_bytes)
    inventory, formats, statistics = task.inventory, task.formats, task.quantizer.statistics
    steps = learning_steps(
        inventory, formats, statistics, task.learning, task.tokens, bank is not None, task.rounding, task.sequences
    )
    progress.plan(steps)
    hidden = HiddenStates(folder.hidden, task.sequences, task.length, state_width(inventory))
    run = CalibrationRun(BlockStream(inventory, compute_device()), calibration, hidden, progress, folder.journal)
    return in_order(run, task.candidates.cut(inventory), bank, task.candidates.group_size)


def _scored(task: _Task, run: CalibrationRun, folder: WorkFolder) -> Scores:
    """Learn and write the scores. They record the amount of text where it is less than all by the model's size."""
    scores = learn_scores(run, BankReader(folder.bank), task.learning)
    if not task.candidates.amount_is_given and task.inventory.parameters < FULL_FROM_PARAMETERS:
        amount = {"sequences": task.sequences, "sequence_length": task.length}
        scores = scores.model_copy(update={"settings": scores.settings | {"calibration": amount}})
    if folder.process_group.leads:
        scores.write(folder.scores)
    return scores


def compute_device() -> str:
    """Where blocks run: the GPU of this process if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
