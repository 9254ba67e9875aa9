"""Which model of the store, which budget, which assignment: an explicit choice always beats the automatic one."""

import re
from dataclasses import dataclass, field
from typing import Any

from allocator.choosing import choose_kv_dtype
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.fitting import Device, Plan, PlanRequest
from allocator.fitting.serving import serving_options
from allocator.fitting.visible import device_of_visible, read_devices
from allocator.progress import Progress
from allocator.sidecar.entry import Entry
from allocator.sidecar.planning import device_of, plan_entry
from allocator.sidecar.resident import solve_for_plan
from allocator.sidecar.settings import PrepareSettings
from allocator.sidecar.store import Store
from allocator.solving import SolveSettings, solve_scores

__all__ = ["Choice", "choose", "find_entry"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Choice:
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


def choose(settings: PrepareSettings, entry: Entry, store: Store, progress: Progress) -> Choice:
    """The assignment for what `settings` asks, and the plan of it where a GPU is known.

    Raises InputError when nothing says how much memory there is, InfeasibleBudgetError when it does not fit.
    """
    device = _device(settings)
    progress.begin("solving")
    if settings.budget == "auto":
        if device is None:
            raise InputError(
                "no GPU is visible: give --gpu NAME or --gpu-memory 24GiB, or choose with --budget 5.9GiB, "
                "--budget 3.25bits or --budget sha256:MANIFEST"
            )
        why = ""
        if settings.kv_cache_dtype == "auto-choose":
            settings, why = _with_kv_cache(settings, entry, device, store)
        manifest, plan = _planned(settings, entry, device, _scores(store, entry))
        left = f"{device.name} has {plan.weight_budget_bytes:,} bytes a rank left for weights"
        reason = f"{why}{left}: {plan.verdict.message}"
        return Choice(manifest, plan, reason, _arguments(settings, plan))
    if settings.kv_cache_dtype == "auto-choose":
        raise InputError(
            f"--kv-cache-dtype auto-choose shares out the GPU's memory, --budget {settings.budget} has shared it out; "
            "give --kv-cache-dtype auto or fp8, or --budget auto"
        )
    manifest = _explicit(settings.budget, entry, store)
    reason = f"{'manifest' if _DIGEST.fullmatch(settings.budget) else 'budget'} {settings.budget} was asked for"
    if device is None:
        return Choice(manifest, None, reason, _arguments(settings, None))
    plan = plan_entry(entry, _scores(store, entry), device, _request(settings), manifest.modules)
    if not plan.verdict.fits:
        reason += f", although on {device.name} it {plan.verdict.message}"
    return Choice(manifest, plan, reason, _arguments(settings, plan))


def _names(entry: Entry) -> set[str | None]:
    return {entry.name, entry.model.name, entry.model.digest, entry.scores_digest, entry.source.location}


def _device(settings: PrepareSettings) -> Device | None:
    if settings.gpu_memory_bytes is not None or settings.gpu != "auto":
        return device_of(None if settings.gpu == "auto" else settings.gpu, settings.gpu_memory_bytes)
    visible = read_devices()
    return device_of_visible(visible, settings.tensor_parallel_size) if visible else None


def _planned(settings: PrepareSettings, entry: Entry, device: Device, scores: Scores) -> tuple[Manifest, Plan]:
    plan = plan_entry(entry, scores, device, _request(settings))
    if not plan.verdict.fits:
        raise InfeasibleBudgetError(f"{entry.name} does not fit on {device.name}: {plan.verdict.message}")
    manifest = solve_for_plan(scores, SolveSettings(), plan)
    return manifest, plan_entry(entry, scores, device, _request(settings), manifest.modules)


def _with_kv_cache(
    settings: PrepareSettings, entry: Entry, device: Device, store: Store
) -> tuple[PrepareSettings, str]:
    """`settings` with the dtype of the KV cache that costs least together with the weights beside it, and why."""
    measured = store.kv_cache(entry.model.digest)
    if measured is None:
        raise InputError(
            f"{store.url} does not know what a KV cache of fp8 costs {entry.name}: run `gamma kv MODEL --out "
            "WORK/kv_cache.json` and `gamma store add WORK` again, or give --kv-cache-dtype auto or fp8"
        )

    scores = _scores(store, entry)

    def plan_for(dtype: str) -> Plan:
        return plan_entry(entry, scores, device, _request(settings.model_copy(update={"kv_cache_dtype": dtype})))

    best, options = choose_kv_dtype(scores, measured, SolveSettings(), plan_for)
    told = [f"{o.dtype} {o.message if o.total_loss is None else f'{o.total_loss:.4g}'}" for o in options]
    chosen = settings.model_copy(update={"kv_cache_dtype": best.dtype})
    return chosen, f"a KV cache of {best.dtype} costs least with its weights ({'; '.join(told)}); "


def _explicit(budget: str, entry: Entry, store: Store) -> Manifest:
    if _DIGEST.fullmatch(budget):
        manifest = store.manifest(budget)
        if manifest is None:
            raise InputError(f"{store.url} has no manifest {budget}")
        if manifest.bank_digest != entry.bank_digest:
            raise InputError(
                f"manifest {budget} is of bank {manifest.bank_digest}, {entry.name} has {entry.bank_digest}"
            )
        return manifest
    return solve_scores(_scores(store, entry), SolveSettings(budget=budget))


def _scores(store: Store, entry: Entry) -> Scores:
    scores = store.scores(entry.scores_digest)
    if scores is None:
        raise InputError(f"{store.url} has lost the scores {entry.scores_digest}; add them again")
    return scores


def _request(settings: PrepareSettings) -> PlanRequest:
    given: dict[str, Any] = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }
    return PlanRequest(**{name: value for name, value in given.items() if value is not None})


def _arguments(settings: PrepareSettings, plan: Plan | None) -> dict[str, Any]:
    """Options for `vllm serve`: all that the plan rests on, without a plan only what was asked for."""
    if plan is not None:
        return dict(serving_options(plan))
    given = {
        "tensor-parallel-size": settings.tensor_parallel_size if settings.tensor_parallel_size > 1 else None,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "kv-cache-dtype": settings.kv_cache_dtype if settings.kv_cache_dtype != "auto" else None,
        "gpu-memory-utilization": settings.gpu_memory_utilization,
    }
    return {name: value for name, value in given.items() if value is not None}
