"""Every answer that is no success: `{"error": {"type", "message", "param"}}`, one status for one kind of mistake."""

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from allocator.contract.errors import ContractError, GammaError, InfeasibleBudgetError, InputError
from allocator.sidecar.backends import StoreUnreachableError
from allocator.sidecar.schemas import ErrorResponse

__all__ = ["ApiError", "error_response", "install_handlers", "of_gamma_error", "responses"]

_TYPES = {
    400: "invalid_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "timeout", 409: "conflict", 413: "too_large", 415: "unsupported_media_type", 421: "misdirected",
    422: "invalid_schema", 429: "too_many_requests", 500: "internal", 503: "unavailable",
}  # fmt: skip
_DESCRIPTIONS = {
    400: "the request cannot be used: broken JSON, or a value that means nothing here, such as an unknown unit",
    401: "no bearer token, or one that is not known",
    403: "the token, or read-only mode, does not allow this",
    404: "no such object",
    405: "the path has no such method",
    408: "the body did not come in time",
    409: "what is stored contradicts the request",
    413: "the body is too large",
    415: "the body is not sent as application/json",
    421: "the Host header is not of this service",
    422: "the body is not of the schema, or no assignment fits the budget",
    429: "too much at once; try again after Retry-After seconds",
    500: "a mistake of the service; the log has the request id",
    503: "not possible at the moment",
}


_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
"""Options of the command line: the fields of a request have their names, with underscores."""


class ApiError(Exception):
    """Raised by routes; becomes the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers
        self.kind = kind or _TYPES[status]


def error_response(error: ApiError) -> Response:
    body = {"error": {"type": error.kind, "message": error.message, "param": error.param}}
    content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    return Response(content, error.status, error.headers, "application/json")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the errors that a route can answer, besides those that every route can."""
    return {
        status: {"model": ErrorResponse, "description": _DESCRIPTIONS[status]}
        for status in sorted({*statuses, 400, 405, 421, 429, 500})
    }


def of_gamma_error(error: GammaError, param: str | None) -> ApiError:
    """The answer for an error that the command line would print; options are named as the fields of requests."""
    if isinstance(error, StoreUnreachableError):
        return ApiError(503, str(error), None)
    message = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), str(error))
    if isinstance(error, InfeasibleBudgetError):
        return ApiError(422, message, param, "infeasible_budget")
    if isinstance(error, InputError):
        return ApiError(400, message, param)
    if isinstance(error, ContractError):
        return ApiError(409, message, param)
    return ApiError(500, message, param)


def install_handlers(app: FastAPI) -> None:
    """Replace the defaults of FastAPI and Starlette."""

    @app.exception_handler(ApiError)
    async def _api(_request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(GammaError)
    async def _gamma(_request: Request, error: GammaError) -> Response:
        return error_response(of_gamma_error(error, None))

    @app.exception_handler(RequestValidationError)
    async def _schema(_request: Request, error: RequestValidationError) -> Response:
        return error_response(_of_validation(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in _TYPES else 400
        if status == 400 and "parsing the body" in str(error.detail):  # FastAPI's words
            return error_response(ApiError(400, "the body is not valid JSON", kind="invalid_json"))
        message = {
            404: "no such path; /openapi.json lists them",
            405: "this path has no such method; Allow names those it has",
        }.get(status, str(error.detail))
        headers = {"Allow": _allowed(app, request)} if status == 405 else error.headers
        return error_response(ApiError(status, message, headers=headers))


def _allowed(app: FastAPI, request: Request) -> str:
    """The methods of all routes of a path; Starlette names those of the first."""
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _of_validation(error: RequestValidationError) -> ApiError:
    """400 when the body is no JSON at all, 422 when it is not of the schema."""
    items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
    first: dict[str, Any] = items[0] if items else {"type": "", "loc": (), "msg": "not of the schema"}
    place = [str(part) for part in first["loc"]]
    where = place[0] if place else "body"
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {reason}", None, "invalid_json")
    param = ".".join(place[1:])[:200] or None
    message = f"{first['msg']}" + (f" (at {param})" if param else f" ({where})")
    if len(items) > 1:
        message += f"; and {len(items) - 1} more"
    return ApiError(422, message[:1000], param)
