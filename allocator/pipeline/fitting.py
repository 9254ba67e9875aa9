"""From a model and a budget to a checkpoint: plan, learn, solve and export. What `gamma fit` calls."""

import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from allocator.blocks import BlockStream
from allocator.contract.amounts import parse_average_bits, parse_budget
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.outputs import check_output_folder
from allocator.contract.scores import Scores
from allocator.evaluate import Student, verify_against_uniform
from allocator.export import ExportReport, ExportSettings, check_target
from allocator.model import Inventory, read_inventory
from allocator.pipeline.calibration_text import calibration_text
from allocator.pipeline.exporting import export
from allocator.pipeline.learning import LearnResult, compute_device, learn
from allocator.pipeline.measure import kv_scores_of
from allocator.pipeline.model_folder import resolve_model
from allocator.pipeline.settings import CandidateSettings
from allocator.pipeline.tuning import TuneRequest, tune
from allocator.plan import Device, Plan, PlannedWeights, PlanRequest, make_plan
from allocator.plan.fusion import AskedFusion, fusion_for, fusion_price
from allocator.plan.gpus import device_again
from allocator.plan.probe_records import probe_lines
from allocator.plan.vllm_arguments import vllm_arguments, write_vllm_config
from allocator.plan.weights import read_model
from allocator.quantize import BankReader
from allocator.run.progress import PlannedStep, Progress, silent
from allocator.run.work_folder import Resume
from allocator.score import LearningSettings
from allocator.solve import SolveSettings, solve_resident, solve_scores
from allocator.solve.kv_cache_dtype import KvOption, choose_kv_dtype

__all__ = ["FitRequest", "FitResult", "GpuTarget", "fit"]

_VERIFIED_SEQUENCES = 32


@dataclass(frozen=True)
class GpuTarget:
    """A GPU and what it is to serve. With `choose_kv_cache` the dtype of the KV cache is one more choice: that of the
    least total loss."""

    device: Device
    traffic: PlanRequest
    choose_kv_cache: bool = False


@dataclass(frozen=True)
class FitRequest:
    """A model, folders to write, and a budget.

    With `target`, a GPU or a plan for one, the budget is the bytes that a rank has for weights, and that of `solving`
    does not count; `fusion` decides about its fusion. `probe`: see `probe_lines`. With `verified` the assignment is
    measured against the best uniform plan of the same bytes, on calibration text drawn anew. With `tuned` the chosen
    candidates are learned anew after that (see `tune`), on such text too.
    """

    model: str
    out: Path
    work: Path
    solving: SolveSettings
    candidates: CandidateSettings
    learning: LearningSettings
    revision: str | None = None
    target: GpuTarget | Plan | None = None
    fusion: AskedFusion = "auto"
    probe: str | None = None
    verified: bool = False
    tuned: bool = False
    overwrite: bool = False
    resume: Resume = "auto"


@dataclass(frozen=True)
class FitResult:
    """`plan` is the one that was solved for, `kv_options` what every dtype of the KV cache would cost where it was
    chosen, `price` what tied fusion costs where the plan chose it, and `serve` the command that serves the checkpoint.
    """

    manifest: Manifest
    report: ExportReport
    serve: str
    plan: Plan | None = None
    kv_options: list[KvOption] = field(default_factory=list)
    price: str = ""


def fit(request: FitRequest, progress: Progress = silent) -> FitResult:
    """The checkpoint of `request`; budget, GPU and folders are checked before anything is computed.

    With a target, `plan.json` and `vllm.yaml` are written beside the weights. Raises InputError,
    InfeasibleBudgetError when nothing fits.
    """
    _check_request(request)
    plan = request.target if not isinstance(request.target, GpuTarget) else _planned(request, request.target)
    inventory = read_inventory(resolve_model(request.model, request.revision))
    _check_budget(request, inventory, plan)
    after = ["solving", *(["verifying"] if request.verified else []), "writing", "digests"]
    progress.plan([PlannedStep(name, 0.0) for name in after])
    learned = learn(inventory.folder, request.work, request.candidates, request.learning, progress, request.resume)
    options: list[KvOption] = []
    if isinstance(request.target, GpuTarget) and request.target.choose_kv_cache:
        plan, options = _choose_kv_cache(request, request.target, learned.scores, inventory, progress)
    progress.begin("solving")
    settings = replace(request.solving, fusion=fusion_for(request.fusion, plan))
    manifest = _solved(learned.scores, settings, plan)
    if request.verified:
        manifest = _verified(request, manifest, learned, inventory, plan, progress)
    bank = learned.bank_folder
    if request.tuned:
        manifest, bank = _tuned(request, manifest, learned, progress)
    exporting = ExportSettings(overwrite=request.overwrite)
    report = export(manifest, inventory.folder, bank, request.out, exporting, progress)
    serve = f"vllm serve {request.out}" if plan is None else _write_serving(request, plan)
    return FitResult(manifest, report, serve, plan, options, _price(manifest, learned.scores, settings, plan))


def _check_request(request: FitRequest) -> None:
    """What can be said without the model."""
    check_output_folder(request.out, replaced=True)
    check_output_folder(request.work, "--work")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "several processes can learn together, but one writes the checkpoint; run `gamma learn` under torchrun, "
            "then `gamma fit` with the same --work and without it"
        )


def _check_budget(request: FitRequest, inventory: Inventory, plan: Plan | None) -> None:
    """Raises InfeasibleBudgetError if the narrowest candidates are too large, InputError if `out` has too little room.

    Where the KV cache is still to be chosen, no plan is checked: another dtype may leave more.
    """
    candidates, budget = request.candidates, request.solving.budget
    cut = candidates.cut(inventory)
    low, high = candidates.formats.feasible_bytes(cut)
    if budget is not None and parse_average_bits(budget) is None and parse_budget(budget) < low:
        raise InfeasibleBudgetError(
            f"budget {budget} is below the smallest checkpoint; feasible are {low} to {high} bytes "
            f"({low / 2**30:.2f} to {high / 2**30:.2f} GiB). Raise the budget, or allow narrower widths"
        )
    chosen_later = isinstance(request.target, GpuTarget) and request.target.choose_kv_cache
    if plan is not None and not chosen_later:
        _check_plan(plan, cut, candidates)
    check_target(request.out, low, request.overwrite)


def _check_plan(plan: Plan, inventory: Inventory, candidates: CandidateSettings) -> None:
    if not plan.verdict.fits:
        raise InfeasibleBudgetError(f"it does not fit on {plan.device.name}: {plan.verdict.message}")
    smallest = max(plan.residency.stage_bytes(candidates.formats.narrowest(inventory)))
    if smallest > plan.weight_budget_bytes:
        raise InfeasibleBudgetError(
            f"the plan leaves {plan.weight_budget_bytes} bytes of a rank for weights, the narrowest candidates take "
            f"{smallest}; allow narrower widths, or plan for less traffic or a larger GPU"
        )


def _planned(request: FitRequest, target: GpuTarget, kv_cache_dtype: str | None = None) -> Plan:
    """The plan for the GPU, with a KV cache of `kv_cache_dtype` (None: that of the traffic)."""
    model, traffic = read_model(request.model, request.revision), target.traffic
    if kv_cache_dtype is not None:
        traffic = traffic.model_copy(update={"kv_cache_dtype": kv_cache_dtype})
    weights = PlannedWeights(request.candidates.group_size, request.candidates.symmetric)
    probe = probe_lines(request.probe, model.shape, target.device, traffic)
    return make_plan(model.shape, target.device, traffic, model=model.name, weights=weights, probe=probe)


def _choose_kv_cache(
    request: FitRequest, target: GpuTarget, scores: Scores, inventory: Inventory, progress: Progress
) -> tuple[Plan, list[KvOption]]:
    """Measure what the KV cache costs; the plan with the dtype of the least total loss, and all options."""
    measured = kv_scores_of(inventory.folder, request.work, scores, request.candidates, progress)
    plans: dict[str, Plan] = {}

    def plan_for(dtype: str) -> Plan:
        plans[dtype] = _planned(request, target, dtype)
        return plans[dtype]

    settings = replace(request.solving, fusion=fusion_for(request.fusion, plan_for("auto")))
    chosen, options = choose_kv_dtype(scores, measured, settings, plan_for)
    return plans[chosen.dtype], options


def _solved(scores: Scores, settings: SolveSettings, plan: Plan | None) -> Manifest:
    if plan is None:
        return solve_scores(scores, settings)
    return solve_resident(scores, settings, plan.residency, plan.weight_budget_bytes, f"plan for {plan.device.name}")


def _verified(
    request: FitRequest,
    manifest: Manifest,
    learned: LearnResult,
    inventory: Inventory,
    plan: Plan | None,
    progress: Progress,
) -> Manifest:
    candidates = request.candidates
    sequences, length = candidates.amount(inventory)
    anew = replace(
        candidates, seed=candidates.seed + 1, sequences=min(sequences, _VERIFIED_SEQUENCES), sequence_length=length
    )
    text = calibration_text(inventory, anew, progress)
    bank = BankReader(learned.bank_folder)
    student = Student(BlockStream(bank.arranged(inventory), compute_device()), bank, text.token_ids)
    residency = None if plan is None else plan.residency
    return verify_against_uniform(manifest, learned.scores, student, request.solving.rules, residency, progress)


def _tuned(request: FitRequest, manifest: Manifest, learned: LearnResult, progress: Progress) -> tuple[Manifest, Path]:
    """The manifest of the tuned candidates or of those there were, whichever is better, and its bank."""
    candidates, folder = request.candidates, request.work / "tuned"
    asked = TuneRequest(
        manifest, resolve_model(request.model, request.revision), learned.bank_folder,
        candidates.calibration, folder, candidates.sequences, candidates.sequence_length, candidates.seed + 2,
    )  # fmt: skip
    found = tune(asked, progress)
    kept = found.bank_digest != manifest.bank_digest
    return found, folder / "bank" if kept else learned.bank_folder


def _price(manifest: Manifest, scores: Scores, settings: SolveSettings, plan: Plan | None) -> str:
    """What tied fusion costs, where the plan chose it."""
    if plan is None or settings.fusion == "free" or manifest.proof is None:
        return ""
    return fusion_price(manifest, lambda: _solved(scores, replace(settings, fusion="free"), plan))


def _write_serving(request: FitRequest, plan: Plan) -> str:
    """The plan of the finished checkpoint and `vllm.yaml` beside it; returns the command that serves it."""
    checkpoint, device = request.out, device_again(plan.device)
    model = read_model(str(checkpoint))
    probe = probe_lines(request.probe, model.shape, device, plan.request)
    weights = PlannedWeights(formats=model.formats)
    final = make_plan(model.shape, device, plan.request, model=plan.model, weights=weights, probe=probe)
    final.write(checkpoint / "plan.json")
    write_vllm_config(final, checkpoint.absolute())
    return shlex.join(vllm_arguments(final, str(checkpoint)))
