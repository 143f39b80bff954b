"""A collector of traces: an HTTP server that reads OTLP as OpenTelemetry's own messages say it."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """A span; ids are hexadecimal digits, empty for no parent, and times nanoseconds. `service` is `service.name`."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any]


@dataclass
class Collector:
    """What has come so far, and the headers and the bodies that it came with."""

    url: str = ""
    spans: list[Received] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]


def spans_of(body: bytes) -> list[Received]:
    """The spans of an export request."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = []
    for of_process in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = values(of_process.resource.attributes)["service.name"]
        for scope in of_process.scope_spans:
            for span in scope.spans:
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                times = (span.start_time_unix_nano, span.end_time_unix_nano)
                failed = span.status.code == span.status.STATUS_CODE_ERROR
                found.append(Received(*ids, service, span.name, *times, failed, values(span.attributes)))
    return found


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """One that listens on a port of loopback."""
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            made.headers.append(dict(self.headers.items()))
            made.bodies.append(body)
            made.spans += spans_of(body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        thread = threading.Thread(target=server.serve_forever, name="collector")
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
