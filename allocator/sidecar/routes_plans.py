"""/v1/gpus, /v1/plans."""

from fastapi import APIRouter

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["plans"])
