"""/v1/checkpoints, /v1/jobs."""

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from allocator.sidecar.errors import responses
from allocator.sidecar.routes_solving import After, DigestPath, Limit, may_write, service_of
from allocator.sidecar.schemas import CheckpointRequest, Deleted, Job, JobList

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["checkpoints"])


@router.post(
    "/checkpoints",
    status_code=202,
    response_model=Job,
    responses=responses(401, 403, 404, 408, 413, 415, 422, 503),
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
    may_write(request, "checkpoints are not made here")
    job = await service.jobs.submit(body.manifest)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


@router.get("/jobs", responses=responses(401, 422, 503), summary="All jobs of the store, by id")
async def list_jobs(request: Request, limit: Limit = 50, after: After = None) -> JobList:
    data, following = await service_of(request).jobs.page(limit, after)
    return JobList(data=data, next=following)


@router.get("/jobs/{id}", responses=responses(401, 404, 422, 503), summary="How a checkpoint stands")
async def get_job(request: Request, id: DigestPath) -> Job:
    return await service_of(request).jobs.get(id)


@router.post(
    "/jobs/{id}/cancel",
    responses=responses(401, 403, 404, 408, 409, 413, 415, 422, 503),
    summary="End a job that waits or is being made, by whichever service",
)
async def cancel_job(request: Request, id: DigestPath) -> Job:
    may_write(request, "jobs are not cancelled here")
    return await service_of(request).jobs.cancel(id)


@router.delete(
    "/jobs/{id}",
    responses=responses(401, 403, 404, 408, 409, 413, 415, 422, 503),
    summary="Forget a job that has ended, a failed one too; its checkpoint stays",
)
async def delete_job(request: Request, id: DigestPath) -> Deleted:
    may_write(request, "jobs are not deleted here")
    await service_of(request).jobs.delete(id)
    return Deleted(id=id)
