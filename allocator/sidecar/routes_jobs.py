"""/v1/checkpoints, /v1/jobs."""

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from allocator.sidecar.errors import ApiError, responses
from allocator.sidecar.routes_solving import DigestPath, service_of
from allocator.sidecar.schemas import CheckpointRequest, Job

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["checkpoints"])


@router.post(
    "/checkpoints",
    status_code=202,
    response_model=Job,
    responses=responses(401, 403, 404, 408, 413, 422, 503),
    summary="Make the checkpoint of a stored manifest",
)
async def make_checkpoint(
    request: Request,
    response: Response,
    body: Annotated[
        CheckpointRequest, Body(openapi_examples={"stored": {"value": {"manifest": "sha256:" + "0" * 64}}})
    ],
) -> Job:
    service = service_of(request)
    if not request.state.may_write:
        reason = "the service is read-only" if service.settings.read_only else "this needs a write token"
        raise ApiError(403, f"checkpoints are not made here: {reason}")
    job = await service.jobs.submit(body.manifest)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.get("/jobs/{id}", responses=responses(401, 404, 422), summary="How a checkpoint stands")
async def get_job(request: Request, id: DigestPath) -> Job:
    return await service_of(request).jobs.get(id)
