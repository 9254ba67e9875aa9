"""/v1/models, /v1/allocations, /v1/manifests, /v1/sweeps, /v1/diff."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request, Response

from allocator.sidecar.entry import Entry
from allocator.sidecar.errors import responses
from allocator.sidecar.schemas import (
    Allocation,
    AllocationRequest,
    DiffRequest,
    ModelInfo,
    ModelList,
    SweepRequest,
    SweepResult,
)
from allocator.sidecar.service import Service

__all__ = ["DigestPath", "router", "service_of"]

router = APIRouter(prefix="/v1", tags=["assignments"])

DigestPath = Annotated[
    str,
    Path(pattern=r"^sha256:[0-9a-f]{64}$", description="a digest", examples=["sha256:" + "0" * 64]),
]
_JSON = "application/json"
_SOLVED = responses(401, 404, 408, 409, 413, 422, 503)
_STORED = responses(401, 404, 422)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/models", responses=responses(401, 409), summary="What the store has scores of")
async def list_models(request: Request) -> ModelList:
    entries = await service_of(request).catalogue.entries()
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
                "by hardware": {"value": {"model": "Qwen3-32B", "plan": {"gpu": "rtx-4090", "max_model_len": 8192}}},
            }
        ),
    ],
    keep: Annotated[bool, Query(description="keep it in the store, which needs a write token")] = True,
) -> Response:
    content = await service_of(request).allocations.allocate(body, keep and request.state.may_write)
    return Response(content, media_type=_JSON)


@router.get("/allocations/{id}", response_model=Allocation, responses=_STORED, summary="An allocation again")
async def get_allocation(request: Request, id: DigestPath) -> Response:
    return Response(await service_of(request).allocations.allocation(id), media_type=_JSON)


@router.get(
    "/allocations/{id}/manifest",
    response_model=dict[str, Any],
    responses=_STORED,
    summary="Its manifest, byte for byte as `gamma solve --out` writes it",
)
async def get_allocation_manifest(request: Request, id: DigestPath) -> Response:
    return Response(await service_of(request).allocations.manifest(id), media_type=_JSON)


@router.get(
    "/manifests/{id}",
    response_model=dict[str, Any],
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
    response_model=dict[str, Any],
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
            }
        ),
    ],
) -> dict[str, Any]:
    service = service_of(request)
    before, after = [await _known(service, side) for side in (body.before, body.after)]
    document: dict[str, Any] = await service.pool.run("diff", before, after)
    return document


async def _known(service: Service, side: str | dict[str, Any]) -> bytes | dict[str, Any]:
    """A manifest by digest as its text: what was not kept is known to this process only."""
    return side if isinstance(side, dict) else await service.allocations.manifest_text(side)


def _model(entry: Entry) -> ModelInfo:
    return ModelInfo(
        name=entry.name, architecture=entry.model.architecture, model_digest=entry.model.digest,
        scores_digest=entry.scores_digest, bank_digest=entry.bank_digest, method=entry.method, unit=entry.unit,
        quantizer=entry.quantizer, group_size=entry.group_size, symmetric=entry.symmetric, widths=entry.widths,
        modules=entry.modules, feasible_bytes=list(entry.feasible_bytes), added=entry.added,
    )  # fmt: skip
