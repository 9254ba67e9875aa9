"""Which model of the store, which budget, which assignment: an explicit choice always beats the automatic one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.model.shape import read_shape
from allocator.plan import Device, Plan, PlanRequest
from allocator.plan.fusion import fusion_for, fusion_price
from allocator.plan.lora import check_lora
from allocator.plan.schema import check_request, default_num_seqs
from allocator.plan.visible_gpus import device_of_visible, read_devices
from allocator.plan.vllm_arguments import check_arguments, serving_options
from allocator.plan.weights import residency_of
from allocator.run.progress import Progress
from allocator.sidecar.planning import find_device, plan_entry, solve_for_plan
from allocator.sidecar.settings import PrepareSettings
from allocator.sidecar.store import Entry, Store, is_digest
from allocator.solve import Fusion, SolveSettings, solve_scores
from allocator.solve.kv_cache_dtype import choose_kv_dtype

__all__ = ["Selection", "choose", "find_entry"]


@dataclass(frozen=True)
class Selection:
    """The assignment, the plan of it (None without a GPU), arguments for vLLM, and the reason in words."""

    manifest: Manifest
    plan: Plan | None
    reason: str
    vllm_arguments: dict[str, Any] = field(default_factory=dict)


def find_entry(store: Store, model: str) -> Entry:
    """The newest entry of a model given by name in the store, digest of model or scores, folder or hub id."""
    listing = store.listing()
    entries = listing.entries
    wanted = model.rstrip("/")
    last = wanted.rpartition("/")[2]
    for keys in ({wanted}, {last}):
        found = [e for e in entries if keys & _names(e)]
        if found:
            return found[-1]
    offers = ", ".join(sorted({e.name for e in entries})) or "nothing"
    broken = "".join(f"; cannot be read: {reason}" for reason in listing.unreadable.values())
    raise InputError(
        f"{store.url} has no scores of {model!r}; it offers {offers}. `gamma store add` adds a model{broken}"
    )


def choose(settings: PrepareSettings, entry: Entry, store: Store, progress: Progress) -> Selection:
    """The assignment for what `settings` asks, and the plan of it where a GPU is known.

    Raises InputError when nothing says how much memory there is, InfeasibleBudgetError when it does not fit.
    """
    device = _device(settings)
    request = _request(settings, device)
    progress.begin("solving")
    if settings.budget == "auto":
        if device is None:
            raise InputError(
                "no GPU is visible: give --gpu NAME or --gpu-memory 24GiB, or choose with --budget 5.9GiB, "
                "--budget 3.25bits or --budget sha256:MANIFEST"
            )
        why = ""
        if settings.kv_cache_dtype == "auto-choose":
            request, why = _with_kv_cache(settings, request, entry, device, store)
        manifest, plan, price = _planned(settings, request, entry, device, _scores(store, entry))
        left = f"{device.name} has {plan.weight_budget_bytes:,} bytes a rank left for weights"
        return _checked(settings, Selection(manifest, plan, f"{why}{left}: {plan.verdict.message}{price}"))
    if settings.kv_cache_dtype == "auto-choose":
        raise InputError(
            f"--kv-cache-dtype auto-choose shares out the GPU's memory, --budget {settings.budget} has shared it out; "
            "give --kv-cache-dtype auto or fp8, or --budget auto"
        )
    reason = f"{'manifest' if is_digest(settings.budget) else 'budget'} {settings.budget} was asked for"
    if device is None:
        manifest, price = _explicit(settings, fusion_for(settings.fusion, None), entry, store)
        _check_ranks(request, entry, manifest)
        return _checked(settings, Selection(manifest, None, reason + price))
    plan = plan_entry(entry, _scores(store, entry), device, request)
    manifest, price = _explicit(settings, fusion_for(settings.fusion, plan), entry, store)
    plan = plan_entry(entry, _scores(store, entry), device, request, manifest.modules)
    if not plan.verdict.fits:
        reason += f", although on {device.name} it {plan.verdict.message}"
    return _checked(settings, Selection(manifest, plan, reason + price))


def _names(entry: Entry) -> set[str | None]:
    return {entry.name, entry.model.name, entry.model.digest, entry.scores_digest, entry.source.location}


def _device(settings: PrepareSettings) -> Device | None:
    if settings.gpu_memory_bytes is not None or settings.gpu != "auto":
        return find_device(None if settings.gpu == "auto" else settings.gpu, settings.gpu_memory_bytes)
    visible = read_devices()
    return device_of_visible(visible, settings.tensor_parallel_size) if visible else None


def _planned(
    settings: PrepareSettings, request: PlanRequest, entry: Entry, device: Device, scores: Scores
) -> tuple[Manifest, Plan, str]:
    """The assignment for what the device leaves, its plan, and the price of tied fusion in words."""
    plan = plan_entry(entry, scores, device, request)
    if not plan.verdict.fits:
        raise InfeasibleBudgetError(f"{entry.name} does not fit on {device.name}: {plan.verdict.message}")
    fusion = fusion_for(settings.fusion, plan)
    manifest = solve_for_plan(scores, SolveSettings(fusion=fusion), plan)
    price = _price(fusion, manifest, lambda: solve_for_plan(scores, SolveSettings(), plan))
    return manifest, plan_entry(entry, scores, device, request, manifest.modules), price


def _with_kv_cache(
    settings: PrepareSettings, request: PlanRequest, entry: Entry, device: Device, store: Store
) -> tuple[PlanRequest, str]:
    """`request` with the dtype of the KV cache that costs least together with the weights beside it, and why."""
    measured = store.kv_cache(entry.model.digest)
    if measured is None:
        raise InputError(
            f"{store.url} does not know what a KV cache of fp8 costs {entry.name}: run `gamma kv MODEL --out "
            "WORK/kv_cache.json` and `gamma store add WORK` again, or give --kv-cache-dtype auto or fp8"
        )

    scores = _scores(store, entry)

    def plan_for(dtype: str) -> Plan:
        return plan_entry(entry, scores, device, request.model_copy(update={"kv_cache_dtype": dtype}))

    fusion = fusion_for(settings.fusion, plan_for("auto"))
    best, options = choose_kv_dtype(scores, measured, SolveSettings(fusion=fusion), plan_for)
    told = [f"{o.dtype} {o.message if o.total_loss is None else f'{o.total_loss:.4g}'}" for o in options]
    chosen = request.model_copy(update={"kv_cache_dtype": best.dtype})
    return chosen, f"a KV cache of {best.dtype} costs least with its weights ({'; '.join(told)}); "


def _explicit(settings: PrepareSettings, fusion: Fusion, entry: Entry, store: Store) -> tuple[Manifest, str]:
    """The assignment that the budget names or asks for, and the price of tied fusion in words."""
    budget = settings.budget
    if is_digest(budget):
        manifest = store.manifest(budget)
        if manifest is None:
            raise InputError(f"{store.url} has no manifest {budget}")
        if manifest.bank_digest != entry.bank_digest:
            raise InputError(
                f"manifest {budget} is of bank {manifest.bank_digest}, {entry.name} has {entry.bank_digest}"
            )
        return manifest, ""
    free = SolveSettings(budget=budget)
    scores = _scores(store, entry)
    manifest = solve_scores(scores, replace(free, fusion=fusion))
    return manifest, _price(fusion, manifest, lambda: solve_scores(scores, free))


def _price(fusion: Fusion, manifest: Manifest, solve_free: Callable[[], Manifest]) -> str:
    return "" if fusion == "free" else f"; {fusion_price(manifest, solve_free)}"


def _check_ranks(request: PlanRequest, entry: Entry, manifest: Manifest) -> None:
    """Without a GPU to plan for: what vLLM would refuse all the same. Raises InputError."""
    shape = read_shape(entry.config)
    check_request(request, shape, None)
    if request.lora is not None:
        check_lora(shape, request.lora)
    residency_of(shape, request).stage_bytes(manifest.modules)


def _scores(store: Store, entry: Entry) -> Scores:
    scores = store.scores(entry.scores_digest)
    if scores is None:
        raise InputError(f"{store.url} has lost the scores {entry.scores_digest}; add them again")
    return scores


def _request(settings: PrepareSettings, device: Device | None) -> PlanRequest:
    given: dict[str, Any] = {
        name: getattr(settings, name)
        for name in (
            "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size",
            "gpu_memory_utilization", "expert_parallel", "enforce_eager", "lora",
        )
        if getattr(settings, name) is not None
    }  # fmt: skip
    if settings.kv_cache_dtype != "auto-choose":
        given["kv_cache_dtype"] = settings.kv_cache_dtype
    if settings.max_num_seqs is None and device is not None:
        most = default_num_seqs(device.cuda_bytes, device.name)
        given |= {"max_num_seqs": min(most, settings.max_num_batched_tokens or most), "kv_sequences": 1}
    return PlanRequest(**given)


def _checked(settings: PrepareSettings, choice: Selection) -> Selection:
    """`choice` with the options of `vllm serve`: all that the plan rests on, without a plan what was asked for.

    Raises InputError when `settings.vllm_args` contradict them.
    """
    if choice.plan is not None:
        options: dict[str, Any] = dict(serving_options(choice.plan))
        check_arguments(settings.vllm_args, options)
        return replace(choice, vllm_arguments=options)
    lora = settings.lora
    given = {
        "tensor-parallel-size": settings.tensor_parallel_size if settings.tensor_parallel_size > 1 else None,
        "pipeline-parallel-size": settings.pipeline_parallel_size if settings.pipeline_parallel_size > 1 else None,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "max-num-batched-tokens": settings.max_num_batched_tokens,
        "kv-cache-dtype": settings.kv_cache_dtype if settings.kv_cache_dtype != "auto" else None,
        "gpu-memory-utilization": settings.gpu_memory_utilization,
        "enable-expert-parallel": settings.expert_parallel or None,
        "enforce-eager": settings.enforce_eager or None,
        "enable-lora": None if lora is None else True,
        "max-loras": None if lora is None else lora.max_loras,
        "max-lora-rank": None if lora is None else lora.max_lora_rank,
        "lora-target-modules": None if lora is None else lora.target_modules,
    }
    options = {name: value for name, value in given.items() if value is not None}
    check_arguments(settings.vllm_args, options)
    return replace(choice, vllm_arguments=options)
