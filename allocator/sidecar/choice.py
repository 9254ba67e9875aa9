"""Which model of the store, which budget, which assignment: an explicit choice always beats the automatic one."""

import re
from dataclasses import dataclass, field
from typing import Any

from allocator.contract.documents import Document
from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.progress import Progress
from allocator.sidecar.entry import Entry
from allocator.sidecar.settings import PrepareSettings
from allocator.sidecar.store import Store
from allocator.solving import SolveSettings, solve_scores

__all__ = ["Choice", "choose_budget", "find_entry"]

_BITS = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?) ?bits?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Choice:
    """The assignment, the plan it was made for (None without a GPU), arguments for vLLM, and the reason in words."""

    manifest: Manifest
    plan: Document | None
    reason: str
    vllm_arguments: dict[str, Any] = field(default_factory=dict)


def find_entry(store: Store, model: str) -> Entry:
    """The newest entry of a model given by name in the store, digest of model or scores, folder or hub id."""
    entries = store.entries()
    wanted = model.rstrip("/")
    last = wanted.rpartition("/")[2]
    for keys in ({wanted}, {last}):
        found = [e for e in entries if keys & _names(e)]
        if found:
            return found[-1]
    offers = ", ".join(sorted({e.name for e in entries})) or "nothing"
    raise InputError(f"{store.url} has no scores of {model!r}; it offers {offers}. `gamma store add` adds a model")


def _names(entry: Entry) -> set[str | None]:
    return {entry.name, entry.model.name, entry.model.digest, entry.scores_digest, entry.source.location}


def choose_budget(settings: PrepareSettings, entry: Entry, store: Store, progress: Progress) -> Choice:
    """The assignment for what `settings` asks. Raises InputError when nothing says how much memory there is."""
    budget = settings.budget
    arguments = _arguments(settings)
    if _DIGEST.fullmatch(budget):
        manifest = store.manifest(budget)
        if manifest is None:
            raise InputError(f"{store.url} has no manifest {budget}")
        if manifest.bank_digest != entry.bank_digest:
            raise InputError(
                f"manifest {budget} is of bank {manifest.bank_digest}, {entry.name} has {entry.bank_digest}"
            )
        return Choice(manifest, None, f"manifest {budget} was asked for", arguments)
    if budget == "auto":
        raise InputError("no GPU is known; give --budget")
    scores = store.scores(entry.scores_digest)
    if scores is None:
        raise InputError(f"{store.url} has lost the scores {entry.scores_digest}; add them again")
    bits = _BITS.fullmatch(budget)
    solving = SolveSettings(average_bits=float(bits[1])) if bits else SolveSettings(budget=budget)
    progress("solving", 0.0)
    manifest = solve_scores(scores, solving)
    progress("solving", 1.0)
    return Choice(manifest, None, f"budget {budget} was asked for", arguments)


def _arguments(settings: PrepareSettings) -> dict[str, Any]:
    """What was asked of vLLM, by its own option names."""
    given = {
        "tensor-parallel-size": settings.tensor_parallel_size if settings.tensor_parallel_size > 1 else None,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "kv-cache-dtype": settings.kv_cache_dtype if settings.kv_cache_dtype != "auto" else None,
        "gpu-memory-utilization": settings.gpu_memory_utilization,
    }
    return {name: value for name, value in given.items() if value is not None}
