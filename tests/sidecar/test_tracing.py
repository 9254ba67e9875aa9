"""Spans as a collector receives them: OTLP over HTTP, decoded."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .serving import running

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def collector() -> Iterator[tuple[str, list]]:
    """Address, and the `ResourceSpans` that came."""
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    found: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            found.extend(messages.ExportTraceServiceRequest.FromString(body).resource_spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", found
        server.shutdown()


def _values(attributes) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


def test_requests_and_solves_are_spans_of_one_trace(tiny_store: Path, tmp_path: Path, collector) -> None:
    url, found = collector
    body = {"model": "tiny", "average_bits": 4.6}
    log = tmp_path / "log"
    with running(log, "--store", tiny_store, "--read-only", OTEL_EXPORTER_OTLP_ENDPOINT=url) as service:
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "X-Request-Id": "mine-1"}
        service.post("/v1/allocations", body, headers=headers)
        service.get("/v1/allocations/x", 422)
    # The service sends what is left when it ends.
    assert {_values(r.resource.attributes)["service.name"] for r in found} == {"gamma-sidecar"}
    spans = [span for r in found for scope in r.scope_spans for span in scope.spans]
    request = next(s for s in spans if s.name == "POST /v1/allocations")
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    told = _values(request.attributes)
    assert (told["gamma.request_id"], told["http.response.status_code"]) == ("mine-1", 200)
    solve = next(s for s in spans if s.name == "solve allocate")
    assert (solve.trace_id, solve.parent_span_id) == (request.trace_id, request.span_id)
    assert request.start_time_unix_nano <= solve.start_time_unix_nano < solve.end_time_unix_nano
    assert any(s.name == "GET /v1/allocations/{id}" for s in spans)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert any(line.get("trace_id") == TRACE and line["request_id"] == "mine-1" for line in lines)


def test_a_collector_that_is_away_harms_nobody(tiny_store: Path, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with running(tmp_path / "log", "--store", tiny_store, OTEL_EXPORTER_OTLP_ENDPOINT=url) as service:
            assert service.get("/v1/models")["data"]
        # It ended all the same, or `running` had raised.
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("{")] == []
