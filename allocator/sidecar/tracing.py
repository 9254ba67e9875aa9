"""OpenTelemetry spans, one a request and one a solve inside it: only where the environment names a collector."""

import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from allocator.sidecar.logs import Log

__all__ = ["Tracing"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_MILLISECONDS = 3000


class Tracing:
    """Does nothing unless OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) is set.

    Then spans go there as OTLP over HTTP, with the exporter's own variables (headers, timeouts, sampling,
    OTEL_SERVICE_NAME). A request goes on with the trace of its `traceparent` header. Without the packages of the extra
    `otel` the log says so, and nothing is traced: the variable may be set for all pods of a cluster.
    """

    def __init__(self, log: Log) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if not any(os.environ.get(name) for name in _ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED") == "true":
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            log("warning", "nothing is traced", reason=f"{error.name} is not installed; pip install 'gamma-vllm[otel]'")
            return
        name = os.environ.get("OTEL_SERVICE_NAME", "gamma-sidecar")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("allocator.sidecar")
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = [_Forward(log)], False

    @contextmanager
    def request(self, scope: MutableMapping[str, Any], request_id: str) -> Iterator[Any]:
        """A span around the answer to `scope`; what is yielded goes to `finish`."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:300],
            "gamma.request_id": request_id,
        }
        with self._tracer.start_as_current_span(
            scope["method"], extract(carrier), SpanKind.SERVER, attributes,
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            yield span

    def finish(self, span: Any, method: str, route: str, status: int) -> dict[str, str]:
        """Say how a request ended; the fields that its line of log gets."""
        if span is None:
            return {}
        from opentelemetry.trace import StatusCode, format_trace_id

        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        return {"trace_id": format_trace_id(span.get_span_context().trace_id)}

    @contextmanager
    def solve(self, task: str) -> Iterator[None]:
        """A span around one call of a solver process, its wait for a free one included."""
        if self._tracer is None:
            yield
            return
        with self._tracer.start_as_current_span(
            f"solve {task}", record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                raise

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        if self._provider is not None:
            self._provider.force_flush(_FLUSH_MILLISECONDS)


class _Forward(logging.Handler):
    """The exporter's complaints as lines of our log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log("warning", "tracing", reason=record.getMessage()[:500])
