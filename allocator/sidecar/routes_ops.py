"""What operators and their tools read: health, version, metrics, the node's state, and the console."""

from importlib.resources import files

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from allocator import __version__
from allocator.sidecar.errors import responses
from allocator.sidecar.routes_solving import service_of
from allocator.sidecar.schemas import Health, NodeStatus, Version

__all__ = ["router"]

router = APIRouter(tags=["operation"])

_CONSOLE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "console.css": ("console.css", "text/css; charset=utf-8"),
    "console.js": ("console.js", "text/javascript; charset=utf-8"),
    "charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "api.js": ("api.js", "text/javascript; charset=utf-8"),
    "format.js": ("format.js", "text/javascript; charset=utf-8"),
    "panels.js": ("panels.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}


@router.get("/healthz", responses=responses(), summary="The process answers")
async def healthz() -> Health:
    return Health(status="ok")


@router.get(
    "/readyz",
    responses=responses()
    | {503: {"model": Health, "description": "not prepared yet, preparing failed, or the store was never read"}},
    summary="The service can be used; with --node: checkpoint and vllm.yaml are there",
)
async def readyz(request: Request, response: Response) -> Health:
    service = service_of(request)
    reason = service.not_ready
    if reason is None:
        return Health(status="ok", message=service.node.status.message or service.entries.remarks)
    response.status_code = 503
    return Health(status="not ready", message=reason)


@router.get("/version", responses=responses(), summary="Release of the service and version of the API")
async def version() -> Version:
    return Version(version=__version__)


@router.get("/v1/node", responses=responses(401), summary="What --node prepared")
async def node(request: Request) -> NodeStatus:
    return service_of(request).node.status


@router.get("/metrics", response_class=Response, responses=responses(), summary="For Prometheus")
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_console(name: str, file: str, media_type: str) -> None:
    content = files("allocator.sidecar").joinpath("console", file).read_bytes()
    headers = {"Cache-Control": "no-cache"}

    async def serve() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    router.add_api_route(f"/{name}", serve, methods=["GET"], include_in_schema=False)


for _name, (_file, _media_type) in _CONSOLE.items():
    _add_console(_name, _file, _media_type)
