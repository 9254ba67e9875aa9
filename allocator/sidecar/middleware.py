"""What happens around every request: its id, limits on its body, who may ask, headers, metrics and the log."""

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from allocator.sidecar.errors import ApiError, error_response
from allocator.sidecar.logs import Log
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.settings import is_loopback
from allocator.sidecar.tokens import Scope, Tokens
from allocator.sidecar.tracing import Tracing

__all__ = ["Guard", "Limits", "Observer"]

Dictionary = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Dictionary]]
Send = Callable[[Dictionary], Awaitable[None]]
Asgi = Callable[[Dictionary, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/version"})
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="gamma"'}
_CONSOLE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _CONSOLE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]


class Observer:
    """Gives each request an id, counts, times and traces it, writes one line of log, and adds the security headers."""

    def __init__(self, app: Asgi, metrics: Metrics, log: Log, tracing: Tracing) -> None:
        self._app, self._metrics, self._log, self._tracing = app, metrics, log, tracing

    async def __call__(self, scope: Dictionary, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = next((v for k, v in scope["headers"] if k == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        status = 0
        dynamic = scope["path"].startswith("/v1/")

        async def send_more(message: Dictionary) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = [*message.get("headers", ()), *_HEADERS, (b"x-request-id", request_id)]
                if dynamic:
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        with self._tracing.request(scope, request_id.decode()) as span:
            try:
                await self._app(scope, receive, send_more)
            except Exception as error:
                self._log("error", "unexpected error", request_id=request_id.decode(), reason=repr(error))
                if status:
                    raise
                answer = error_response(ApiError(500, f"unexpected error; the log has request {request_id.decode()}"))
                await answer(scope, receive, send_more)
            finally:
                self._note(scope, status, time.perf_counter() - started, request_id, span)

    def _note(self, scope: Dictionary, status: int, seconds: float, request_id: bytes, span: Any) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.observe(route, method, status, seconds)
        traced = self._tracing.finish(span, method, route, status)
        level = "debug" if scope["path"] in _QUIET and status < 400 else "info"
        if self._log.wants(level):
            client = scope.get("client")
            self._log(
                level, "request", request_id=request_id.decode(), method=method, path=scope["path"][:300],
                status=status, seconds=round(seconds, 6), client=client[0] if client else None, **traced,
            )  # fmt: skip


class Guard:
    """Who may ask what: bearer tokens for /v1/. Without token files only this machine, by a Host that means it.

    Health, metrics and version are for everybody: probes and Prometheus have no tokens.
    """

    def __init__(self, app: Asgi, tokens: Tokens | None, hosts: frozenset[str], read_only: bool) -> None:
        self._app, self._tokens, self._hosts, self._read_only = app, tokens, hosts, read_only

    async def __call__(self, scope: Dictionary, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                granted = self._granted(scope)
                scope.setdefault("state", {})["may_write"] = granted == "write" and not self._read_only
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _granted(self, scope: Dictionary) -> Scope:
        headers = dict(scope["headers"])
        if self._tokens is None:
            if scope["path"] in _OPEN:
                return "read"
            client = scope.get("client")
            if client is None or not is_loopback(client[0]):
                raise ApiError(401, "without --token-file the service answers this machine only", headers=_CHALLENGE)
            # A web page elsewhere can make a browser ask us under its own name (DNS rebinding).
            if _host_of(headers.get(b"host", b"")) not in self._hosts:
                raise ApiError(421, "the Host header is not of this machine; start the service with --token-file")
            return "write"
        if not scope["path"].startswith("/v1/"):
            return "read"
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise ApiError(401, "a bearer token is needed: Authorization: Bearer TOKEN", headers=_CHALLENGE)
        granted = self._tokens.scope_of(token.strip())
        if granted is None:
            why = "; a token file cannot be used, the service's log has the reason" if self._tokens.problems else ""
            raise ApiError(401, f"the token is not known{why}", headers=_CHALLENGE)
        return granted


def _host_of(header: bytes) -> str:
    host = header.decode("latin-1").lower()
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _is_json(scope: Dictionary) -> bool:
    """A missing type is none: a page elsewhere can make a browser send such a body without asking us first."""
    given = next((v for k, v in scope["headers"] if k == b"content-type"), b"").partition(b";")[0].strip().lower()
    return bool(given == b"application/json" or (given.startswith(b"application/") and given.endswith(b"+json")))


class Limits:
    """A body of at most `most_bytes`, all of it within `seconds`, and JSON by its type."""

    def __init__(self, app: Asgi, most_bytes: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Dictionary, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._whole(scope, receive), self._seconds)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        except TimeoutError:
            late = ApiError(408, f"the body did not come within {self._seconds:g} s", headers={"Connection": "close"})
            await error_response(late)(scope, receive, send)
            return
        if body is None:
            return
        if body and not _is_json(scope):
            await error_response(ApiError(415, "the body must be JSON: send Content-Type: application/json"))(
                scope, receive, send
            )
            return
        first: Dictionary | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_again() -> Dictionary:
            nonlocal first
            if first is not None:
                message, first = first, None
                return message
            return await receive()

        await self._app(scope, receive_again, send)

    async def _whole(self, scope: Dictionary, receive: Receive) -> bytes | None:
        """The body, None when the client left."""
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if not length.isdigit() or int(length) > self._most:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._most:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most} bytes", headers={"Connection": "close"})
