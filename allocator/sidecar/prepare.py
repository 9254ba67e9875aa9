"""From a store and a GPU to a folder that `vllm serve` starts from: choose, solve, export, write the arguments."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.digest import digest_json
from allocator.contract.documents import write_atomically
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.outputs import check_output_folder
from allocator.run.progress import Progress, silent
from allocator.sidecar.choice import Selection, choose, find_entry
from allocator.sidecar.materialise import materialise
from allocator.sidecar.node_cache import make_room, using
from allocator.sidecar.prepared import PREPARED_NAME, Prepared, read_prepared
from allocator.sidecar.settings import PrepareSettings
from allocator.sidecar.store import Entry, Store

__all__ = ["Prepared", "prepare"]


def prepare(
    settings: PrepareSettings,
    store: Store,
    out: Path,
    progress: Progress = silent,
    cache_limit_bytes: int | None = None,
) -> Prepared:
    """Fill `out`: checkpoint/, vllm.yaml, plan.json (when a GPU is known), manifest.json, and prepared.json.

    The checkpoint appears as a whole or not at all, prepared.json last. With the same request and a sound checkpoint
    nothing is done. Raises InputError (no such model, nothing to choose by), ContractError (files that do not belong
    together), InfeasibleBudgetError (it does not fit; says what would).

    With `cache_limit_bytes` the folder of `out` is a node's cache: room is made in it, and `out` marked as used.
    """
    if cache_limit_bytes is not None:
        with using(out):
            return _prepare(settings, store, out, progress, cache_limit_bytes)
    return _prepare(settings, store, out, progress, None)


def _prepare(
    settings: PrepareSettings, store: Store, out: Path, progress: Progress, cache_limit_bytes: int | None
) -> Prepared:
    if not (out / PREPARED_NAME).exists():  # else there may be nothing to write
        check_output_folder(out)
    store.check()
    entry = find_entry(store, settings.model)
    choice = choose(settings, entry, store, progress)
    request = digest_json({
        "settings": settings.model_dump(mode="json", exclude={"vllm_args"}),
        "scores": entry.scores_digest,
        "manifest": choice.manifest.digest,
        "arguments": choice.vllm_arguments,
    })  # fmt: skip
    present = _present(out, request, choice.manifest)
    if present is not None:
        return present
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        present = _present(out, request, choice.manifest)  # another may have done it meanwhile
        if present is None and cache_limit_bytes is not None:
            for unused in make_room(out.parent, cache_limit_bytes, choice.manifest.tensor_bytes, keep=out):
                progress.begin(f"removed {unused.path.name}, unused")
        return present or _fill(out, request, settings, choice, entry, store, progress)


def _fill(
    out: Path,
    request: str,
    settings: PrepareSettings,
    choice: Selection,
    entry: Entry,
    store: Store,
    progress: Progress,
) -> Prepared:
    checkpoint = out / "checkpoint"
    (out / PREPARED_NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the store may be mounted read-only; the manifest lies in `out` too
        store.add_manifest(choice.manifest)
    materialise(choice.manifest, entry, store, checkpoint, progress)
    arguments = {
        "model": str(checkpoint),
        "served-model-name": settings.served_model_name or entry.name,
        **choice.vllm_arguments,
    }
    write_atomically(out / "vllm.yaml", _yaml(arguments))
    choice.manifest.write(out / "manifest.json")
    if choice.plan is not None:
        choice.plan.write(out / "plan.json")
    else:
        (out / "plan.json").unlink(missing_ok=True)
    prepared = Prepared(
        request_digest=request,
        checkpoint=str(checkpoint),
        manifest_digest=choice.manifest.digest,
        tensor_bytes=choice.manifest.tensor_bytes,
        vllm_arguments=arguments,
        reason=choice.reason,
    )
    write_atomically(out / PREPARED_NAME, prepared.model_dump_json(indent=1) + "\n")
    return prepared


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time fills `out`: pods may share the volume. Where files cannot be locked, nobody waits."""
    with (out / ".lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _present(out: Path, request: str, manifest: Manifest) -> Prepared | None:
    """What was prepared before, if it was for the same request and the checkpoint is still sound."""
    try:
        prepared = read_prepared(out)
        _config, found = check_checkpoint(Path(prepared.checkpoint))
    except (OSError, ValueError, ContractError, InputError):
        return None
    same = prepared.request_digest == request and found.digest == manifest.digest
    return prepared.model_copy(update={"unchanged": True}) if same and (out / "vllm.yaml").is_file() else None


def _yaml(arguments: dict[str, Any]) -> str:
    """`vllm serve --config` reads YAML; every JSON scalar is one."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in arguments.items())
