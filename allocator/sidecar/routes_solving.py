"""/v1/models, /v1/allocations, /v1/fits, /v1/manifests, /v1/sweeps, /v1/diff."""

import asyncio
import json
from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Request, Response

from allocator.contract.documents import DIGEST_PATTERN
from allocator.sidecar.errors import ApiError, responses
from allocator.sidecar.schemas import (
    Allocation,
    AllocationList,
    AllocationRequest,
    Deleted,
    DiffRequest,
    DiffResult,
    Fit,
    FitRequest,
    ManifestAnswer,
    ManifestList,
    ModelInfo,
    ModelList,
    SweepRequest,
    SweepResult,
)
from allocator.sidecar.service import Service
from allocator.sidecar.store import Entry
from allocator.sidecar.stored import allocations_of, drop_allocation, drop_manifest, manifests_of

__all__ = ["After", "DigestPath", "Limit", "may_write", "router", "service_of"]

router = APIRouter(prefix="/v1", tags=["assignments"])

DigestPath = Annotated[
    str,
    Path(pattern=DIGEST_PATTERN, description="a digest", examples=["sha256:" + "0" * 64]),
]
Limit = Annotated[int, Query(ge=1, le=200, description="how many at once")]
After = Annotated[
    str | None,
    Query(pattern=DIGEST_PATTERN, description="the `next` of the part before, for the following one"),
]
_JSON = "application/json"
_SOLVED = responses(401, 404, 408, 409, 413, 415, 422, 503)
_STORED = responses(401, 404, 422, 503)
_DELETED = responses(401, 403, 404, 408, 409, 413, 415, 422, 503)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def may_write(request: Request, what_not: str) -> None:
    """Raises ApiError 403."""
    if not request.state.may_write:
        read_only = service_of(request).settings.read_only
        reason = "the service is read-only" if read_only else "this needs a write token"
        raise ApiError(403, f"{what_not}: {reason}")


@router.get("/models", responses=responses(401, 503), summary="What the store has scores of")
async def list_models(request: Request) -> ModelList:
    entries = await service_of(request).entries.all()
    return ModelList(data=[_model(entry) for entry in reversed(entries)])


@router.post(
    "/allocations",
    response_model=Allocation,
    responses=_SOLVED,
    summary="The best assignment for a budget",
)
async def allocate(
    request: Request,
    body: Annotated[
        AllocationRequest,
        Body(
            openapi_examples={
                "by memory": {"value": {"model": "Qwen3-32B", "budget": "18GiB"}},
                "by average bits": {"value": {"model": "Qwen3-32B", "average_bits": 3.25, "pins": {"*.0.*": 8}}},
                "the same, short": {"value": {"model": "Qwen3-32B", "budget": "3.25bits"}},
                "by hardware": {"value": {"model": "Qwen3-32B", "plan": {"gpu": "rtx-4090", "max_model_len": 8192}}},
            }
        ),
    ],
    keep: Annotated[bool, Query(description="keep it in the store, which needs a write token")] = True,
    manifest: Annotated[bool, Query(description="answer with the manifest too: what is not kept has no other")] = False,
) -> Response:
    allocations, persist = service_of(request).allocations, keep and request.state.may_write
    if not manifest:
        return Response(await allocations.allocate(body, persist), media_type=_JSON)
    content, text = await allocations.allocate_whole(body, persist)
    return Response(json.dumps(json.loads(content) | {"manifest": text.decode()}), media_type=_JSON)


@router.post(
    "/fits",
    response_model=Fit,
    responses=_SOLVED,
    summary="A model on some hardware, all in one answer: plan, allocation with manifest, room for the KV cache",
)
async def fit(
    request: Request,
    body: Annotated[
        FitRequest,
        Body(
            openapi_examples={
                "what fits": {"value": {"model": "Qwen3-32B", "hardware": {"gpu": "rtx4090", "max_model_len": 8192}}},
                "a size": {"value": {"model": "Qwen3-32B", "hardware": {"gpu": "l40s"}, "budget": "20GiB"}},
            }
        ),
    ],
) -> Response:
    return Response(await service_of(request).allocations.fit(body), media_type=_JSON)


@router.get("/allocations", responses=responses(401, 422, 503), summary="The allocations of the store, by id")
async def list_allocations(request: Request, limit: Limit = 50, after: After = None) -> AllocationList:
    data, following = await asyncio.to_thread(allocations_of, service_of(request).store, limit, after)
    return AllocationList(data=data, next=following)


@router.get("/manifests", responses=responses(401, 422, 503), summary="The manifests of the store, by digest")
async def list_manifests(request: Request, limit: Limit = 50, after: After = None) -> ManifestList:
    data, following = await asyncio.to_thread(manifests_of, service_of(request).store, limit, after)
    return ManifestList(data=data, next=following)


@router.delete("/allocations/{id}", responses=_DELETED, summary="Delete an allocation from the store")
async def delete_allocation(request: Request, id: DigestPath) -> Deleted:
    may_write(request, "allocations are not deleted here")
    service = service_of(request)
    await asyncio.to_thread(drop_allocation, service.store, id)
    service.allocations.forget("allocation", id)
    return Deleted(id=id)


@router.delete("/manifests/{id}", responses=_DELETED, summary="Delete a manifest that no stored allocation names")
async def delete_manifest(request: Request, id: DigestPath) -> Deleted:
    may_write(request, "manifests are not deleted here")
    service = service_of(request)
    await asyncio.to_thread(drop_manifest, service.store, id)
    service.allocations.forget("manifest", id)
    return Deleted(id=id)


@router.get("/allocations/{id}", response_model=Allocation, responses=_STORED, summary="An allocation again")
async def get_allocation(request: Request, id: DigestPath) -> Response:
    return Response(await service_of(request).allocations.allocation(id), media_type=_JSON)


@router.get(
    "/allocations/{id}/manifest",
    response_model=ManifestAnswer,
    responses=_STORED,
    summary="Its manifest, byte for byte as `gamma solve --out` writes it",
)
async def get_allocation_manifest(request: Request, id: DigestPath) -> Response:
    return Response(await service_of(request).allocations.manifest(id), media_type=_JSON)


@router.get(
    "/manifests/{id}",
    response_model=ManifestAnswer,
    responses=_STORED,
    summary="A manifest by its own digest",
)
async def get_manifest(request: Request, id: DigestPath) -> Response:
    return Response(await service_of(request).allocations.manifest_text(id), media_type=_JSON)


@router.post(
    "/sweeps",
    response_model=SweepResult,
    responses=_SOLVED,
    summary="The Pareto curve: size against predicted loss",
)
async def sweep(
    request: Request,
    body: Annotated[
        SweepRequest, Body(openapi_examples={"whole range": {"value": {"model": "Qwen3-32B", "points": 9}}})
    ],
) -> Response:
    return Response(await service_of(request).allocations.sweep(body), media_type=_JSON)


@router.post(
    "/diff",
    response_model=DiffResult,
    responses=_SOLVED,
    summary="What changed between two manifests of one model",
)
async def diff(
    request: Request,
    body: Annotated[
        DiffRequest,
        Body(
            openapi_examples={
                "stored": {"value": {"before": "sha256:" + "0" * 64, "after": "sha256:" + "1" * 64}},
                "by request": {
                    "value": {
                        "before": {"allocation": {"model": "Qwen3-32B", "budget": "3.5bits"}},
                        "after": {"allocation": {"model": "Qwen3-32B", "budget": "18GiB"}},
                    }
                },
            }
        ),
    ],
) -> Response:
    return Response(await service_of(request).allocations.diff(body), media_type=_JSON)


def _model(entry: Entry) -> ModelInfo:
    return ModelInfo(
        name=entry.name, architecture=entry.model.architecture, model_digest=entry.model.digest,
        scores_digest=entry.scores_digest, bank_digest=entry.bank_digest, method=entry.method, unit=entry.unit,
        quantizer=entry.quantizer, group_size=entry.group_size, symmetric=entry.symmetric, widths=entry.widths,
        modules=entry.modules, feasible_bytes=list(entry.feasible_bytes), added=entry.added,
    )  # fmt: skip
