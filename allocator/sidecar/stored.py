"""What the store keeps of answers: lists of allocations and manifests in parts, and taking one of them away."""

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from allocator.contract.errors import ContractError
from allocator.sidecar.errors import ApiError
from allocator.sidecar.job_files import JobFiles, Owner
from allocator.sidecar.schemas import Allocation, ManifestInfo
from allocator.sidecar.store import Store, hex_of

__all__ = ["allocations_of", "drop_allocation", "drop_manifest", "manifests_of"]

AnyItem = TypeVar("AnyItem", bound=BaseModel)


def allocations_of(store: Store, most: int, after: str | None) -> tuple[list[Allocation], str | None]:
    """At most `most` allocations after the id `after`, and the id to go on after, None at the end.

    What cannot be read, such as allocations of another release, is left out.
    """
    digests, following = _part(store, "allocations", most, after)
    found = []
    for digest in digests:
        content = store.backend.read(f"allocations/{hex_of(digest)}.json")
        try:
            found.append(Allocation.model_validate_json(content or b""))
        except ValidationError:
            continue
    return found, following


def manifests_of(store: Store, most: int, after: str | None) -> tuple[list[ManifestInfo], str | None]:
    """The same of manifests."""
    digests, following = _part(store, "manifests", most, after)
    found = []
    for digest in digests:
        try:
            manifest = store.manifest(digest)
        except ContractError:
            continue
        if manifest is not None:
            found.append(
                ManifestInfo(
                    id=digest, model=manifest.model.name, model_digest=manifest.model.digest,
                    bank_digest=manifest.bank_digest, scores_digest=manifest.scores_digest, method=manifest.method,
                    requested=manifest.budget.requested, budget_bytes=manifest.budget.nbytes,
                    tensor_bytes=manifest.tensor_bytes,
                    measured=manifest.verification is not None or manifest.refinement is not None,
                )
            )  # fmt: skip
    return found, following


def drop_allocation(store: Store, digest: str) -> None:
    """Raises ApiError 404."""
    path = f"allocations/{hex_of(digest)}.json"
    if not store.backend.exists(path):
        raise ApiError(404, f"the store has no allocation {digest}", "id")
    store.backend.delete(path)


def drop_manifest(store: Store, digest: str) -> None:
    """Raises ApiError 404; 409 while an allocation names the manifest, or a job makes its checkpoint."""
    path = f"manifests/{hex_of(digest)}.json"
    text = store.backend.read(path)
    if text is None:
        raise ApiError(404, f"the store has no manifest {digest}", "id")
    for name in store.backend.names("allocations"):
        if digest.encode() in (store.backend.read(f"allocations/{name}") or b""):
            used = f"sha256:{name.removesuffix('.json')}"
            raise ApiError(409, f"allocation {used} names the manifest; delete that first", "id")
    files = JobFiles(store, Owner.me())
    for record in filter(None, map(files.read, files.ids())):
        if record.request.manifest == digest and record.job.state in ("queued", "running"):
            raise ApiError(409, f"job {record.job.id} makes its checkpoint; cancel that first", "id")
    scores = json.loads(text).get("scores_digest")
    store.backend.delete(path)
    if scores is not None:
        store.backend.delete(f"measured/{hex_of(scores)}/{hex_of(digest)}")


def _part(store: Store, folder: str, most: int, after: str | None) -> tuple[list[str], str | None]:
    digests = [f"sha256:{name.removesuffix('.json')}" for name in store.backend.names(folder)]
    digests = [digest for digest in digests if after is None or digest > after]
    return digests[:most], digests[most - 1] if len(digests) > most else None
