"""The steps of the data flow as functions on folders and files: what each verb of the command line calls."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from allocator.contract.amounts import parse_average_bits, parse_budget
from allocator.contract.bank import candidate_tensors
from allocator.contract.documents import Document
from allocator.contract.errors import ContractError, InfeasibleBudgetError, InputError
from allocator.contract.layout import WIDTHS, ModuleFormat
from allocator.contract.manifest import Manifest
from allocator.contract.outputs import check_output_folder, naming_lack_of_room
from allocator.contract.safetensors_file import predict_file_bytes
from allocator.contract.scores import Scores
from allocator.run.progress import PlannedStep, Progress, silent
from allocator.solve import SolveSettings, solve_resident, solve_scores

if TYPE_CHECKING:  # they bring torch
    from allocator.calibration.sequences import Calibration
    from allocator.export import Declaration, ExportReport
    from allocator.model import Inventory
    from allocator.plan import Plan
    from allocator.run.work_folder import Resume, WorkFolder
    from allocator.score import LearningSettings

_LARGEST_WRITER_PARAMETERS = 2_000_000_000
"""Larger models do not write their own calibration text: in float32 they would need more than 8 GB of memory."""

__all__ = [
    "CandidateSettings",
    "LearnResult",
    "SolveSettings",
    "export",
    "fit",
    "learn",
    "resolve_model",
    "solve_scores",
]

_LOG = logging.getLogger(__name__)
_VERIFIED_SEQUENCES = 32
_DISK_BLOCK_BYTES = 4096

AnyDocument = TypeVar("AnyDocument", bound=Document)


@dataclass(frozen=True)
class CandidateSettings:
    """What the bank holds, and the calibration text that learning runs on (`None`: see `--calibration`).

    `channel_blocks`: into how many pieces gate_proj and up_proj are cut (`--granularity channel-block`), None for
    whole modules.
    """

    quantizer: str = "gptq"
    widths: Sequence[int] = WIDTHS
    group_size: int = 128
    symmetric: bool = False
    channel_blocks: int | None = None
    calibration: Sequence[Path] | None = None
    sequences: int | None = None
    sequence_length: int | None = None
    seed: int = 0

    def amount(self, inventory: "Inventory") -> tuple[int, int]:
        """Number and length of the calibration sequences: as they are given, else what the model's size asks for."""
        from allocator.calibration.sequences import calibration_amount

        longest = inventory.config.get("max_position_embeddings")
        return calibration_amount(_parameters(inventory), longest, self.sequences, self.sequence_length)


@dataclass(frozen=True)
class LearnResult:
    """model_digest is that of the model as it was read; reused says which of bank and scores were already there."""

    model_digest: str
    scores: Scores
    scores_path: Path
    bank_folder: Path
    reused: list[str] = field(default_factory=list)


def resolve_model(model: str, revision: str | None = None) -> Path:
    """A local model folder: `model` itself, or the download of a hub id (`org/name`, `hf://org/name@revision`)."""
    from allocator.model.hf_config import split_hub

    model, revision = split_hub(model, revision)
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(f"{model}: no such folder, and no Hugging Face id (org/name) either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{model}: cannot be downloaded ({reason}); give a local folder, or check id and network"
        ) from None


def learn(
    model: Path,
    work: Path,
    candidates: CandidateSettings,
    learning: "LearningSettings",
    progress: Progress = silent,
    resume: "Resume" = "auto",
) -> LearnResult:
    """Build the bank and learn the scores of `model` in the folder `work`; what is there and fits is used again.

    A run that was stopped or killed goes on from its last finished step (see `running.WorkFolder.begin` for `resume`).
    Under torchrun the processes share the calibration sequences. Raises InputError before the work if `work` cannot be
    written, or its disk has too little room; also when the disk is full after all: what is finished is kept.
    """
    check_output_folder(work)
    for inside in (work / "bank", work / "hidden", work / "journal"):
        if inside.exists():
            check_output_folder(inside)
    with naming_lack_of_room(work, "What was finished is kept"):
        return _learn(model, work, candidates, learning, progress, resume)


def _learn(
    model: Path,
    work: Path,
    candidates: CandidateSettings,
    learning: "LearningSettings",
    progress: Progress,
    resume: "Resume",
) -> LearnResult:
    import torch

    from allocator.blocks import BlockStream
    from allocator.blocks.hf_model import open_config, open_tokenizer
    from allocator.blocks.hidden_states import HiddenStates
    from allocator.calibration.sequences import FULL_FROM_PARAMETERS
    from allocator.contract.bank import BANK_NAME, Bank, ModelReference
    from allocator.model import channel_layout, cut_unsorted, read_inventory, with_channel_blocks
    from allocator.quantize import BankReader, build_bank, find_channel_order, get_quantizer, make_servable
    from allocator.run.process_group import process_group_from_environment
    from allocator.run.work_folder import RunFingerprint, WorkFolder, versions
    from allocator.score import learn_scores
    from allocator.score.steps import learning_steps

    inventory = read_inventory(model)
    for line in inventory.told():
        _LOG.warning("%s: %s", model, line)
    quantizer = get_quantizer(candidates.quantizer)
    cut = cut_unsorted(inventory, candidates.channel_blocks)
    formats = {
        m.name: [
            f for f in cut.formats(m, candidates.widths, candidates.group_size, candidates.symmetric) if f.quantized
        ]
        for m in cut.modules
    }
    if not any(formats.values()):
        raise InputError(f"{model}: nothing can be quantized; `gamma inspect` shows why")
    parameters, (sequences, length) = _parameters(inventory), candidates.amount(inventory)
    open_config(model)  # before the weights are read, which takes minutes
    if candidates.calibration is not None:
        open_tokenizer(model)
    process_group = process_group_from_environment()
    folder = WorkFolder(work, process_group)
    work.mkdir(parents=True, exist_ok=True)
    tokens = sequences * length
    needed = _bank_bytes(inventory, formats) + _learning_bytes(inventory, formats, tokens, learning)
    if not folder.scores.exists():  # else there may be nothing to do, which is known only later
        _check_room(folder, needed)
    reference = ModelReference(
        name=model.resolve().name,
        architecture=inventory.architecture,
        digest=process_group.from_leader(lambda: _model_digest(inventory, work, progress, remember=True)),
    )
    _LOG.info("calibration: %s", _told_amount(inventory, candidates))
    calibration = process_group.from_leader(lambda: _calibration(inventory, candidates, progress))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made_with = {
        "quantizer": quantizer.name,
        "widths": [w for w in candidates.widths if w < 16],
        "group_size": candidates.group_size,
        "symmetric": candidates.symmetric,
    } | ({} if candidates.channel_blocks is None else {"channel_blocks": candidates.channel_blocks})
    fingerprint = RunFingerprint(
        model=reference,
        calibration={
            "source": calibration.source,
            "digest": calibration.digest,
            "sequences": sequences,
            "sequence_length": length,
        },
        candidates=made_with,
        learning=asdict(learning),
        environment=versions() | {"device": device, "threads": torch.get_num_threads()},
    )
    folder.begin(fingerprint, resume)
    if process_group.leads:
        make_servable(inventory, folder.bank)

    wanted = {
        "model": reference,
        "quantizer": quantizer.name,
        "group_size": candidates.group_size,
        "symmetric": candidates.symmetric,
        "calibration_digest": calibration.digest,
    }
    reused: list[str] = []
    bank = _readable(Bank, folder.bank / BANK_NAME)
    same_bank = (
        bank is not None
        and all(getattr(bank, key) == value for key, value in wanted.items())
        and {n: m.candidates for n, m in bank.modules.items()} == {n: f for n, f in formats.items() if f}
    )
    scores = _readable(Scores, folder.scores)
    if same_bank and bank is not None:
        reused.append("bank")
        if (
            scores is not None
            and scores.bank_digest == bank.digest
            and asdict(learning).items() <= scores.settings.items()
        ):
            folder.finish()
            return LearnResult(reference.digest, scores, folder.scores, folder.bank, [*reused, "scores"])

    hidden = HiddenStates(folder.hidden, sequences, length, inventory.config["hidden_size"])
    _check_room(folder, needed)
    stream = BlockStream(inventory, device)
    states = folder.journal.section("states")
    progress.plan(learning_steps(inventory, formats, quantizer.statistics, learning, tokens, same_bank))
    order = bank.channel_order if same_bank and bank is not None else None
    if order is None and candidates.channel_blocks is not None:
        layout = channel_layout(inventory, candidates.channel_blocks)
        order = find_channel_order(
            stream, calibration.token_ids, hidden, layout, candidates.group_size, progress, states,
            folder.journal.section("channels"),
        )  # fmt: skip
    if order is not None:
        inventory = with_channel_blocks(inventory, order)
        stream = BlockStream(inventory, device)
    if same_bank:
        stream.fill(hidden, calibration.token_ids, progress, states)
    else:
        build_bank(
            inventory, reference, stream, calibration, hidden, quantizer,
            candidates.widths, candidates.group_size, candidates.symmetric, folder.bank, progress,
            states, folder.journal.section("bank"),
        )  # fmt: skip
    scores = learn_scores(
        inventory, stream, BankReader(folder.bank), calibration.token_ids, hidden, learning, progress,
        folder.journal.section("learning"),
    )  # fmt: skip
    if candidates.sequences is None and candidates.sequence_length is None and parameters < FULL_FROM_PARAMETERS:
        amount = {"sequences": sequences, "sequence_length": length}
        scores = scores.model_copy(update={"settings": scores.settings | {"calibration": amount}})
    if process_group.leads:
        scores.write(folder.scores)
    folder.finish()
    return LearnResult(reference.digest, scores, folder.scores, folder.bank, reused)


def _model_digest(inventory: "Inventory", work: Path, progress: Progress, remember: bool = False) -> str:
    """The digest of the model, remembered in `work` if that is a work folder (or will be one)."""
    from allocator.model import DIGEST_CACHE_NAME, cached_model_digest, model_digest
    from allocator.run.work_folder import RUN_NAME

    tell = progress.bytes_of("reading the model")
    if remember or (work / RUN_NAME).exists():
        return cached_model_digest(inventory, work / DIGEST_CACHE_NAME, tell)
    return model_digest(inventory, tell)


def _calibration(inventory: "Inventory", candidates: CandidateSettings, progress: Progress) -> "Calibration":
    from allocator.calibration.sequences import calibration_from_model, calibration_from_python, calibration_from_text

    (sequences, length), model, seed = candidates.amount(inventory), inventory.folder, candidates.seed
    if candidates.calibration is None and _parameters(inventory) <= _LARGEST_WRITER_PARAMETERS:
        return calibration_from_model(model, sequences, length, seed, progress)
    progress.begin("reading text")
    if candidates.calibration is None:
        return calibration_from_python(model, sequences, length, seed)
    return calibration_from_text(model, list(candidates.calibration), sequences, length, seed)


def _told_amount(inventory: "Inventory", candidates: CandidateSettings) -> str:
    sequences, length = candidates.amount(inventory)
    told = f"{sequences} sequences of {length} tokens"
    if candidates.sequences is not None or candidates.sequence_length is not None:
        return told
    return f"{told}, by the model's {_parameters(inventory):,} parameters (--sequences and --sequence-length change it)"


def _parameters(inventory: "Inventory") -> int:
    return sum(m.parameters for m in inventory.modules)


def export(
    manifest: Manifest,
    model: Path,
    bank_folder: Path,
    out: Path,
    overwrite: bool = False,
    progress: Progress = silent,
    digest: str | None = None,
    declaration: "Declaration" = "gamma",
) -> "ExportReport":
    """Write the checkpoint of `manifest` to `out`. `digest` is the model's if it was just computed."""
    from allocator.export import check_declarable, check_target, export_checkpoint
    from allocator.model import read_inventory
    from allocator.quantize import BankReader

    check_target(out, manifest.tensor_bytes, overwrite)
    inventory, bank = read_inventory(model), BankReader(bank_folder)
    check_declarable(manifest, bank.arranged(inventory), declaration)
    if digest is None:
        digest = _model_digest(inventory, bank_folder.parent, progress)
    return export_checkpoint(
        manifest, bank.arranged(inventory), digest, bank, out,
        declaration=declaration, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def fit(
    model: Path,
    work: Path,
    out: Path,
    solving: SolveSettings,
    candidates: CandidateSettings,
    learning: "LearningSettings",
    overwrite: bool = False,
    progress: Progress = silent,
    resume: "Resume" = "auto",
    plan: "Plan | None" = None,
    verified: bool = False,
) -> tuple[Manifest, "ExportReport"]:
    """learn, solve and export. The budget and `out` are checked before anything is computed.

    With `plan` the budget is the bytes that it leaves a rank for weights, and that of `solving` does not count. With
    `verified` the assignment is measured against the best uniform plan (see `refining.verify`), on calibration text
    drawn anew.
    """
    from allocator.export import check_target
    from allocator.model import cut_unsorted, read_inventory

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "several processes can learn together, but one writes the checkpoint; run `gamma learn` under torchrun, "
            "then `gamma fit` with the same --work and without it"
        )
    inventory = read_inventory(model)
    cut = cut_unsorted(inventory, candidates.channel_blocks)
    low, high = cut.feasible_bytes(candidates.widths, candidates.group_size, candidates.symmetric)
    in_bytes = solving.budget is not None and parse_average_bits(solving.budget) is None
    if solving.budget is not None and in_bytes and parse_budget(solving.budget) < low:
        raise InfeasibleBudgetError(
            f"budget {solving.budget} is below the smallest checkpoint; feasible are {low} to {high} bytes "
            f"({low / 2**30:.2f} to {high / 2**30:.2f} GiB). Raise the budget, or allow narrower widths"
        )
    if plan is not None:
        _check_plan(plan, cut, candidates)
    check_target(out, low, overwrite)
    check_output_folder(work, "--work")
    after = ["solving", *(["verifying"] if verified else []), "writing", "digests"]
    progress.plan([PlannedStep(name, 0.0) for name in after])
    result = learn(model, work, candidates, learning, progress, resume)
    progress.begin("solving")
    if plan is None:
        manifest = solve_scores(result.scores, solving)
    else:
        requested = f"plan for {plan.device.name}"
        manifest = solve_resident(result.scores, solving, plan.residency, plan.weight_budget_bytes, requested)
    if verified:
        manifest = _verified(manifest, result, inventory, candidates, solving, plan, progress)
    report = export(manifest, model, result.bank_folder, out, overwrite, progress, result.model_digest)
    return manifest, report


def _verified(
    manifest: Manifest,
    learned: LearnResult,
    inventory: "Inventory",
    candidates: CandidateSettings,
    solving: SolveSettings,
    plan: "Plan | None",
    progress: Progress,
) -> Manifest:
    from allocator.blocks import BlockStream
    from allocator.evaluate import Student, verify
    from allocator.quantize import BankReader

    sequences, length = candidates.amount(inventory)
    anew = replace(
        candidates, seed=candidates.seed + 1, sequences=min(sequences, _VERIFIED_SEQUENCES), sequence_length=length
    )
    text = _calibration(inventory, anew, progress)
    bank = BankReader(learned.bank_folder)
    student = Student(BlockStream(bank.arranged(inventory), _device()), bank, text.token_ids)
    residency = None if plan is None else plan.residency
    return verify(manifest, learned.scores, student, solving.rules, residency, progress)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_plan(plan: "Plan", inventory: "Inventory", candidates: CandidateSettings) -> None:
    """Raises InfeasibleBudgetError if the narrowest candidates are too large for the plan."""
    if not plan.verdict.fits:
        raise InfeasibleBudgetError(f"it does not fit on {plan.device.name}: {plan.verdict.message}")
    narrowest = {
        m.name: inventory.formats(m, candidates.widths, candidates.group_size, candidates.symmetric)[0]
        for m in inventory.modules
    }
    smallest = max(plan.residency.stage_bytes(narrowest))
    if smallest > plan.weight_budget_bytes:
        raise InfeasibleBudgetError(
            f"the plan leaves {plan.weight_budget_bytes} bytes of a rank for weights, the narrowest candidates take "
            f"{smallest}; allow narrower widths, or plan for less traffic or a larger GPU"
        )


def _readable(kind: type[AnyDocument], path: Path) -> AnyDocument | None:
    """The document at `path`, or None if it is absent or damaged: then it is made again."""
    try:
        return kind.read(path)
    except ContractError:
        return None


def _bank_bytes(inventory: "Inventory", formats: Mapping[str, Sequence[ModuleFormat]]) -> int:
    """Bytes of the bank's files on a disk: candidates with their headers, side files, links."""
    from allocator.model import side_files

    tensors = [[t for f in of for t in candidate_tensors(f, inventory.dtype)] for of in formats.values() if of]
    sizes = [predict_file_bytes(of_module) for of_module in tensors]
    if inventory.prefix is not None:  # with other names the model's files cannot be links
        sizes += [path.stat().st_size for path in {module.tensor.path for module in inventory.modules}]
    sizes += [(inventory.folder / name).stat().st_size for name in side_files(inventory).carried]
    return sum(-(-size // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES for size in sizes)


def _learning_bytes(
    inventory: "Inventory", formats: Mapping[str, Sequence[ModuleFormat]], tokens: int, learning: "LearningSettings"
) -> int:
    """Bytes of the hidden states of `tokens`, of gradients, and of what the journal and the scores keep of errors."""
    # Of gradients, which take half of what states take, two boundaries a draw are there at a time.
    states = 4 * tokens * inventory.shape.hidden_size * (inventory.blocks + 1 + learning.draws)
    candidates = sum(map(len, formats.values()))
    errors = 2 * candidates * min(tokens * learning.draws, learning.pair_samples)
    small = _DISK_BLOCK_BYTES * (len(formats) + 3 * (inventory.blocks + 1))
    return states + errors + 4 * candidates**2 // 3 + small


def _check_room(folder: "WorkFolder", needed: int) -> None:
    """Raises InputError if hidden states and bank cannot grow to `needed` bytes on the disk of the work folder."""
    files = [path for name in ("bank", "hidden", "journal") for path in (folder.folder / name).rglob("*")]
    # The model's own files are links in the bank, which take no room there.
    there = sum(path.lstat().st_blocks * 512 for path in files if path.is_file() and not path.is_symlink())
    free = shutil.disk_usage(folder.folder).free
    if free + there < needed:
        raise InputError(
            f"{folder.folder} has {free:,} bytes free; candidates and the hidden states of the calibration text need "
            f"{needed - there:,} more: use a larger disk, or fewer or shorter --sequences"
        )
