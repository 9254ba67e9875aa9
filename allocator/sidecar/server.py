"""Runs the service under uvicorn."""

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from allocator.contract.errors import InputError
from allocator.sidecar.app import create_app
from allocator.sidecar.logs import Log
from allocator.sidecar.settings import ServiceSettings

__all__ = [
    "limited_protocol",
    "serve",
]

_HEADER_BYTES = 1 << 16
_BODY = '{"error": {"type": "%s", "message": "%s", "param": null}}'


class _Limited(asyncio.Protocol):
    """Mixed into uvicorn's protocol, with which it shares `transport` and `cycle`, the latest request.

    The headers of a request must come within `header_seconds` of the connection's start, or of their own first byte on
    a connection that had a request before, and have at most 64 KiB.
    """

    header_seconds: float
    body_bytes: int
    transport: asyncio.Transport
    cycle: Any
    _timer: asyncio.TimerHandle | None = None
    _unfinished_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
            return
        self._unfinished_bytes += len(data)
        # What was answered before its body was read may still be sending it.
        answered_early = self.cycle is not None and self.cycle.more_body
        if self._unfinished_bytes > _HEADER_BYTES + (self.body_bytes if answered_early else 0):
            self._refuse("431 Request Header Fields Too Large", "too_large", f"headers over {_HEADER_BYTES} bytes")
        elif self._timer is None:
            self._start()

    def send_400_response(self, _message: str) -> None:
        """What uvicorn says in plain text of bytes that are no HTTP."""
        self._refuse("400 Bad Request", "invalid_http", "what came is no valid HTTP request")

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.header_seconds, self._late)

    def _stop(self) -> None:
        self._unfinished_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self._unfinished_bytes:
            message = f"the headers did not come within {self.header_seconds:g} s"
            self._refuse("408 Request Timeout", "timeout", message)
        else:
            self.transport.close()

    def _refuse(self, status: str, kind: str, message: str) -> None:
        if not self.transport.is_closing():
            body = _BODY % (kind, message)
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
            self.transport.close()


def limited_protocol(header_seconds: float, body_bytes: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol (httptools where it is installed, else h11), with these limits."""
    limits = {"header_seconds": header_seconds, "body_bytes": body_bytes}
    return type("LimitedProtocol", (_Limited, AutoHTTPProtocol), limits)


class _Server(uvicorn.Server):
    """Says where it listens, once it does: with port 0 only the system knows."""

    def __init__(self, config: uvicorn.Config, log: Log) -> None:
        super().__init__(config)
        self._log = log

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers if self.started else ():
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                self._log("info", "listening", host=host, port=port)


def serve(settings: ServiceSettings) -> None:
    """Serve until the process is told to end (SIGTERM, Ctrl-C). Raises InputError when it cannot start."""
    app = create_app(settings)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, access_log=False, log_level="warning", server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=10, lifespan="on", proxy_headers=False, ws="none",
        http=limited_protocol(settings.header_seconds, settings.body_bytes),
    )  # fmt: skip
    server = _Server(config, app.state.service.log)
    with contextlib.suppress(SystemExit):  # uvicorn's, after it logged why
        server.run()
    if not server.started:
        raise InputError(f"cannot listen on {settings.host}:{settings.port}; is the port taken?")
