"""Traces: places in them as W3C Trace Context writes them, and their way to a collector."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.settings import Settings
from app.tracing import (
    MOST_WAITING,
    SEND_SECONDS,
    RequestTrace,
    Span,
    TraceContext,
    job_traceparent,
    of_request,
    open_tracing,
)
from bitwright.errors import InvalidSettings
from tests.otlp import collector

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-{SPAN}-01", TraceContext(TRACE, SPAN, sampled=True)),
        (f"00-{TRACE}-{SPAN}-00", TraceContext(TRACE, SPAN, sampled=False)),
        (f"00-{TRACE}-{SPAN}-03", TraceContext(TRACE, SPAN, sampled=True)),
        (f"01-{TRACE}-{SPAN}-01-and-what-comes-later", TraceContext(TRACE, SPAN, sampled=True)),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE}-{SPAN}-01\n", None),
        ("", None),
        (None, None),
    ],
)
def test_places_are_read_as_the_standard_says(header: str | None, expected: TraceContext | None) -> None:
    """https://www.w3.org/TR/trace-context/, 3.2 and 4.3."""
    found = TraceContext.parse(header)
    assert found == expected
    if found is not None:
        assert TraceContext.parse(found.traceparent) == found
        assert found.child().trace_id == TRACE
        assert found.child().span_id != SPAN


def test_a_job_is_traced_within_a_request_alone() -> None:
    assert job_traceparent("job_1") is None
    trace = RequestTrace(f"00-{TRACE}-{SPAN}-01")
    with of_request(trace):
        assert job_traceparent("job_1") == trace.context.traceparent
    assert job_traceparent("job_1") is None
    span = trace.ended("POST", "/v1/jobs", 202)
    assert (span.context.trace_id, span.parent, span.error) == (TRACE, SPAN, None)
    assert span.attributes["bitwright.job_id"] == "job_1"
    assert RequestTrace("nonsense").context.trace_id != TRACE
    assert RequestTrace(None).ended("POST", "/v1/jobs", 500).error == "500"


def test_spans_reach_a_collector_with_what_the_settings_say_and_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=leaked"),
        ("OTEL_RESOURCE_ATTRIBUTES", "leaked=1"),
        ("OTEL_SERVICE_NAME", "leaked"),
        ("HTTP_PROXY", "http://127.0.0.1:1"),
    ):
        monkeypatch.setenv(name, value)
    with collector() as received:
        settings = Settings(
            data_dir=tmp_path, otlp_url=received.url, otlp_headers={"x-key": "secret"}, environment="test"
        )
        tracing = open_tracing(settings, "bitwright-worker")
        assert tracing is not None
        parent = TraceContext(TRACE, SPAN)
        span = Span(
            parent.child(), "block", 10, 30, SPAN, attributes={"bitwright.block.index": 3}, error="out_of_memory"
        )
        tracing.tell(span)
        tracing.tell(Span(TraceContext(TRACE, SPAN, sampled=False).child(), "unwanted", 10, 30))
        tracing.close()
    (found,) = received.spans
    assert (found.trace_id, found.span_id, found.parent_id) == (TRACE, span.context.span_id, SPAN)
    assert (found.service, found.name, found.start_ns, found.end_ns) == ("bitwright-worker", "block", 10, 30)
    assert (found.attributes, found.failed) == ({"bitwright.block.index": 3}, True)
    assert received.headers[0]["x-key"] == "secret"
    assert not any(
        "leaked" in str((headers, body)) for headers, body in zip(received.headers, received.bodies, strict=True)
    )


@pytest.mark.slow
def test_a_collector_that_is_away_costs_nobody_anything(tmp_path: Path) -> None:
    tracing = open_tracing(Settings(data_dir=tmp_path, otlp_url="http://127.0.0.1:1/v1/traces"), "bitwright-api")
    assert tracing is not None
    began = time.monotonic()
    for _ in range(2 * MOST_WAITING):
        tracing.tell(Span(TraceContext.begin(), "attempt", 1, 2))
    assert time.monotonic() - began < 2
    tracing.close()
    assert time.monotonic() - began < 2 * SEND_SECONDS + 5


@pytest.mark.slow
def test_without_a_collector_neither_exporter_nor_spans_are_imported(tmp_path: Path) -> None:
    """FastAPI imports OpenTelemetry's interface, and redis its meters, wherever these are installed."""
    program = (
        "THEIRS = ('opentelemetry.exporter', 'opentelemetry.proto', 'opentelemetry.sdk.trace')\n"
        "import sys; import app.api.main, workers.__main__; from app.settings import Settings\n"
        "from app.tracing import open_tracing\n"
        f"assert open_tracing(Settings(data_dir={str(tmp_path)!r}), 'bitwright-api') is None\n"
        "sys.exit(', '.join(name for name in sys.modules if name.startswith(THEIRS)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(InvalidSettings, match="BITWRIGHT_OTLP_URL") as caught:
        open_tracing(Settings(data_dir=tmp_path, otlp_url="http://collector:4318/v1/traces"), "bitwright-api")
    assert "bitwright-service[otel]" in str(caught.value.hint)
