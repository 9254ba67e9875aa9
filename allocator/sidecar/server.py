"""Runs the service under uvicorn."""

import contextlib
import socket

import uvicorn

from allocator.contract.errors import InputError
from allocator.sidecar.app import create_app
from allocator.sidecar.connections import limited_protocol
from allocator.sidecar.logs import Log
from allocator.sidecar.settings import ServiceSettings

__all__ = ["serve"]


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
