"""Traces of jobs: where a request or an attempt stands in one (W3C Trace Context), spans, and their way to a collector.

A job's place in its trace is kept with the job in the database, and goes to the attempt's process in its order. That
process has no network: it tells its spans to the worker, which sends them. Only `open_tracing` needs OpenTelemetry's
packages, the extra `otel`, and imports them only where a collector is set.
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from secrets import token_hex
from typing import TYPE_CHECKING, Literal, Self

from app.settings import Settings
from bitwright.errors import InvalidSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
SAMPLED = 1
SEND_SECONDS = 5.0
"""Longest time for one request to the collector, between two of them, and for the last ones of a process that ends."""
MOST_WAITING = 4096
"""Spans that wait for the collector; of more, the newest are lost."""

Attribute = str | int | float | bool
Kind = Literal["server", "consumer", "internal"]


@dataclass(frozen=True)
class TraceContext:
    """A span by its ids, in hexadecimal digits; not `sampled`: its caller wants no trace."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def begin(cls) -> Self:
        """The first span of a new trace."""
        return cls(token_hex(16), token_hex(8))

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """The span that a `traceparent` names; None if it is none, which starts a new trace by the standard."""
        found = TRACEPARENT.fullmatch(header or "")
        return None if found is None else cls(found[1], found[2], bool(int(found[3], 16) & SAMPLED))

    def child(self) -> Self:
        """A new span of the same trace."""
        return type(self)(self.trace_id, token_hex(8), self.sampled)

    @property
    def traceparent(self) -> str:
        """The header."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


@dataclass(frozen=True)
class Span:
    """A span that has ended. Times are nanoseconds since the epoch.

    parent   id of the span above it, in 16 hexadecimal digits
    error    code of the error that ended it
    """

    context: TraceContext
    name: str
    start_ns: int
    end_ns: int
    parent: str | None = None
    kind: Kind = "internal"
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    error: str | None = None


class Tracing:
    """The way of spans to the collector, for any thread. Nothing here waits: a thread sends, and what fails is lost."""

    def __init__(self, processor: "SpanProcessor", resource: "Resource") -> None:
        self._processor = processor
        self._resource = resource

    def tell(self, span: Span) -> None:
        """Send a span, a little later."""
        if span.context.sampled:
            self._processor.on_end(_readable(span, self._resource))

    def close(self) -> None:
        """Send what waits, as far as the collector takes it in `SEND_SECONDS`."""
        ending = threading.Thread(target=self._processor.shutdown, name="last-spans", daemon=True)
        ending.start()  # by itself it may take half a minute
        ending.join(SEND_SECONDS)


class RequestTrace:
    """The span of a request while it is answered."""

    def __init__(self, header: str | None) -> None:
        self._above = TraceContext.parse(header)
        self._start_ns = time.time_ns()
        self.context = TraceContext.begin() if self._above is None else self._above.child()
        self.attributes: dict[str, Attribute] = {}

    def ended(self, method: str, route: str, status: int) -> Span:
        """The span. It has the route as it was written, no path, no query and no body."""
        http: dict[str, Attribute] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
        }
        return Span(
            context=self.context,
            name=f"{method} {route}",
            start_ns=self._start_ns,
            end_ns=time.time_ns(),
            parent=None if self._above is None else self._above.span_id,
            kind="server",
            attributes=http | self.attributes,
            error=str(status) if status >= 500 or not status else None,
        )


_request: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)


@contextmanager
def of_request(trace: RequestTrace) -> Iterator[None]:
    """Inside, `job_traceparent` is of this request, in the threads that answer it, too."""
    token = _request.set(trace)
    try:
        yield
    finally:
        _request.reset(token)


def job_traceparent(job_id: str) -> str | None:
    """The `traceparent` of the request that makes a job now, which then names the job; None where none is traced."""
    trace = _request.get()
    if trace is None:
        return None
    trace.attributes["bitwright.job_id"] = job_id
    return trace.context.traceparent


def open_tracing(settings: Settings, service: str) -> Tracing | None:
    """The way to the collector that the settings name; None if they name none.

    service   `service.name` of the spans

    Raises:
        InvalidSettings: the extra is not installed.
    """
    if not settings.otlp_url:
        return None
    try:
        import requests  # noqa: PLC0415 - comes with the exporter
        from opentelemetry.exporter.otlp.proto.http import Compression  # noqa: PLC0415
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        hint = "pip install 'bitwright-service[otel]', or unset it"
        raise InvalidSettings(f"BITWRIGHT_OTLP_URL is set, and {error.name} is not installed", hint=hint) from error
    headers = {name: value.get_secret_value() for name, value in settings.otlp_headers.items()}
    session = requests.Session()
    session.trust_env = False  # else proxies and passwords of the environment, which no setting of ours names
    # Everything is given: what is not, the library reads from variables of its own.
    exporter = OTLPSpanExporter(
        endpoint=settings.otlp_url,
        headers={"User-Agent": f"bitwright/{version('bitwright')}", **headers},
        timeout=SEND_SECONDS,
        compression=Compression.Gzip,
        session=session,
    )
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=MOST_WAITING,
        schedule_delay_millis=1000 * SEND_SECONDS,
        max_export_batch_size=512,
        export_timeout_millis=1000 * SEND_SECONDS,
    )
    about = {"service.name": service, "service.version": version("bitwright")}
    return Tracing(processor, Resource(about | {"deployment.environment.name": settings.environment}))


def _readable(span: Span, resource: "Resource") -> "ReadableSpan":
    """The span as OpenTelemetry's exporters take it."""
    from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags  # noqa: PLC0415

    def context(span_id: str, *, remote: bool) -> SpanContext:
        ids = (int(span.context.trace_id, 16), int(span_id, 16))
        return SpanContext(*ids, is_remote=remote, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    return ReadableSpan(
        name=span.name,
        context=context(span.context.span_id, remote=False),
        parent=None if span.parent is None else context(span.parent, remote=True),
        resource=resource,
        attributes=dict(span.attributes),
        kind=SpanKind[span.kind.upper()],
        status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=span.start_ns,
        end_time=max(span.start_ns, span.end_ns),
        instrumentation_scope=InstrumentationScope("bitwright"),
    )
