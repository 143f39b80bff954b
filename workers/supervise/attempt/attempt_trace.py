"""The spans of one attempt, as its worker tells them: the wait for a worker, the attempt, and what its process did."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from app.domain.attempt_lines import SpanLine
from app.store.attempts import Claim
from app.tracing import Attribute, Kind, Span, TraceContext, Tracing
from workers.supervise.context import WorkerContext


class AttemptTrace:
    """Mute where the worker has no tracing, or nobody traced the request that made the job."""

    def __init__(self, context: WorkerContext, claim: Claim) -> None:
        above = TraceContext.parse(claim.traceparent)
        self._tracing: Tracing | None = context.tracing if above is not None else None
        self._above = above or TraceContext.begin()
        self._own = self._above.child()
        self._start_ns = time.time_ns()
        self._attributes: Mapping[str, Attribute] = {
            "bitwright.job_id": claim.job_id,
            "bitwright.attempt": claim.attempt,
            "bitwright.method": claim.request.quantization.method,
            "bitwright.worker_id": context.worker_id,
            "bitwright.device": context.device.value,
        }
        since = int(claim.available_at.timestamp() * 1e9)  # by the database's clock
        self._tell("queue", self._above.child(), min(since, self._start_ns), self._above.span_id)

    @property
    def traceparent(self) -> str | None:
        """The attempt's own, for its order; None where nothing is to be told."""
        return None if self._tracing is None or not self._own.sampled else self._own.traceparent

    def hear(self, line: SpanLine) -> None:
        """Tell a span of the attempt's process; which trace and job it is of is known here."""
        own = TraceContext(self._own.trace_id, line.span_id, self._own.sampled)
        self._tell(line.name, own, line.start_ns, line.parent_id, end_ns=line.end_ns, attributes=line.attributes)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A span of what the worker itself does for the attempt."""
        start_ns = time.time_ns()
        try:
            yield
        finally:
            self._tell(name, self._own.child(), start_ns, self._own.span_id)

    def ended(self, outcome: str, *, well: bool) -> None:
        """Tell the attempt's own span."""
        about = {"bitwright.outcome": outcome}
        error = None if well else outcome
        self._tell("attempt", self._own, self._start_ns, self._above.span_id, attributes=about, error=error)

    def _tell(
        self,
        name: str,
        own: TraceContext,
        start_ns: int,
        parent: str,
        *,
        end_ns: int | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        error: str | None = None,
    ) -> None:
        if self._tracing is not None:
            end_ns, about = end_ns or time.time_ns(), {**(attributes or {}), **self._attributes}
            kind: Kind = "consumer" if name == "attempt" else "internal"
            self._tracing.tell(Span(own, name, start_ns, end_ns, parent, kind, about, error))
