"""The application: middleware, error handlers, routes, console, and the OpenAPI document."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from allocator import __version__
from allocator.sidecar import routes_jobs, routes_ops, routes_plans, routes_solving
from allocator.sidecar.errors import install_handlers
from allocator.sidecar.examples import add_examples
from allocator.sidecar.middleware import Guard, Limits, Observer
from allocator.sidecar.service import Service
from allocator.sidecar.settings import ServiceSettings

__all__ = ["create_app"]

_DESCRIPTION = """Which assignment of bits fits this memory, what it costs in quality, and the checkpoint of it.

Operators choose memory, not bits. Ids are digests of what was asked for: the same request has the same id and the
same answer. Errors are `{"error": {"type", "message", "param"}}`. When the service has token files, every path under
/v1/ needs `Authorization: Bearer TOKEN`; making checkpoints and keeping allocations in the store needs a write token.
"""


def create_app(settings: ServiceSettings) -> FastAPI:
    """The service over `settings.store`. Raises InputError when it cannot be used."""
    service = Service.of(settings)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="GAMMA sidecar", version=__version__, summary="Bits that fit the memory you have.",
        description=_DESCRIPTION, docs_url=None, redoc_url=None, lifespan=life, separate_input_output_schemas=False,
        license_info={"name": "Apache-2.0"}, redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    for part in (routes_solving, routes_plans, routes_jobs, routes_ops):
        app.include_router(part.router)
    install_handlers(app)
    hosts = frozenset({*settings.allowed_hosts, settings.host})
    # The last one added is the outermost.
    app.add_middleware(Limits, most_bytes=settings.body_bytes, seconds=settings.body_seconds)
    app.add_middleware(Guard, tokens=service.tokens, hosts=hosts, read_only=settings.read_only)
    app.add_middleware(Observer, metrics=service.metrics, log=service.log, tracing=service.tracing)
    _complete_document(app)
    return app


def _complete_document(app: FastAPI) -> None:
    """Name the bearer token in the OpenAPI document, and give an example of every answer."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            document.setdefault("components", {})["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            for path, methods in document["paths"].items():
                if path.startswith("/v1/"):
                    for operation in methods.values():
                        operation["security"] = [{"bearer": []}, {}]
            add_examples(document)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
