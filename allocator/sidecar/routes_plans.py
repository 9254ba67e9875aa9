"""/v1/gpus, /v1/plans."""

import json
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from allocator.plan import Gpu, load_catalogue
from allocator.sidecar.errors import responses
from allocator.sidecar.routes_solving import service_of
from allocator.sidecar.schemas import GpuInfo, GpuList, PlanAnswer, PlanRequestBody

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["plans"])


@router.get("/gpus", responses=responses(401), summary="The GPUs that plans know")
async def list_gpus() -> GpuList:
    return GpuList(data=[_gpu(gpu) for gpu in load_catalogue() if gpu.why_not is None])


@router.post(
    "/plans",
    response_model=PlanAnswer,
    responses=responses(401, 404, 408, 409, 413, 415, 422, 503),
    summary="What fits: memory by line, what is left for weights, and what would make it fit",
)
async def plan(
    request: Request,
    body: Annotated[
        PlanRequestBody,
        Body(
            openapi_examples={
                "by name": {"value": {"model": "Qwen3-32B", "gpu": "rtx-4090", "max_model_len": 8192}},
                "by memory": {"value": {"model": "Qwen3-32B", "gpu_memory": "24GiB", "kv_cache_dtype": "fp8"}},
            }
        ),
    ],
) -> Response:
    service = service_of(request)
    entry = await service.entries.find(body.model)
    manifest = None if body.manifest is None else await service.allocations.manifest_text(body.manifest)
    made = await service.allocations.plan(body, entry, manifest)
    return Response(json.dumps(made), media_type="application/json")


def _gpu(gpu: Gpu) -> GpuInfo:
    return GpuInfo(
        name=gpu.name, id=(gpu.aliases or [gpu.name])[0], memory_bytes=gpu.memory_bytes,
        compute_capability=gpu.compute_capability, segment=gpu.segment, product_label=gpu.product_label,
        mig=[part.profile for part in gpu.mig],
    )  # fmt: skip
