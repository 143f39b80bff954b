"""Limits of a request and of a stream, at the byte and at the event where they begin."""

import asyncio
from collections.abc import MutableMapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

import pytest

from app.api.event_feed import Subscription
from app.api.event_stream import encode
from app.api.events import parse_last_event_id
from app.api.http.middleware import BodyLimit
from app.store.events import StoredEvent
from bitwright.errors import InvalidRequest
from bitwright.events import LogEvent

CONSTANTS: dict[str, dict[str, object]] = {
    "event_feed": {"BACKLOG": 256, "POLL_LIMIT": 1000, "LONGEST_PAUSE_SECONDS": 10.0},
    "event_stream": {"KEEP_ALIVE_SECONDS": 15.0, "RECONNECT_MILLISECONDS": 2000, "REPLAY_PAGE": 500},
    "http.errors": {"RETRY_AFTER_SECONDS": 5, "MEDIA_TYPE": "application/problem+json"},
    "http.archive": {"LAYOUT": b"bitwright tar 1\n", "END": bytes(1024)},
    "jobs": {"POLL_AFTER_SECONDS": 2},
    "submission.base_jobs": {"MAX_DESCRIPTION_BYTES": 67_108_864},
    "upload_receiving": {"BUFFER": 1_048_576},
}


@pytest.mark.parametrize("module", CONSTANTS)
def test_a_constant_is_what_it_is_said_to_be(module: str) -> None:
    known = vars(import_module(f"app.api.{module}"))
    assert {name: known[name] for name in CONSTANTS[module]} == CONSTANTS[module]


def status_of(
    parts: Sequence[bytes], *, declared: str | None = None, path: str = "/v1/jobs", method: str = "POST"
) -> int:
    """Status that a body in these parts gets from an application that reads all of it, under a limit of ten bytes."""
    sent: list[MutableMapping[str, Any]] = []
    messages = [{"type": "http.request", "body": part, "more_body": n + 1 < len(parts)} for n, part in enumerate(parts)]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        assert body == b"".join(parts)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run() -> None:
        waiting = iter(messages)

        async def receive() -> MutableMapping[str, Any]:
            return next(waiting)

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        headers = [] if declared is None else [(b"content-length", declared.encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await BodyLimit(application, 10)(scope, receive, send)

    asyncio.run(run())
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("parts", "declared", "status"),
    [
        ([b"0123456789"], None, 200),
        ([b"0123456789"], "10", 200),
        ([b"01234", b"56789", b""], None, 200),
        ([b"0123456789a"], None, 413),
        ([b"01234", b"56789", b"a"], None, 413),
        ([b""], "11", 413),
        ([b""], "9" * 30, 413),
        ([b"0123456789a"], "1", 413),
        ([b""], "x", 200),
    ],
)
def test_a_body_may_have_the_limits_bytes_and_no_more(parts: list[bytes], declared: str | None, status: int) -> None:
    assert status_of(parts, declared=declared) == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/uploads/upl_x/files/a.jsonl", 200),
        ("POST", "/v1/uploads/upl_x/files/a.jsonl", 413),
        ("PUT", "/v1/uploads/upl_x/files/a/b", 413),
        ("PUT", "/v1/uploads//files/a", 413),
        ("PUT", "/x/v1/uploads/upl_x/files/a", 413),
    ],
)
def test_only_parts_of_uploads_are_larger(method: str, path: str, status: int) -> None:
    assert status_of([b"0123456789a"], method=method, path=path) == status


def event(sequence: int) -> StoredEvent:
    return StoredEvent("job", sequence, datetime(2026, 1, 5, 10, tzinfo=UTC), 1, LogEvent(event="line"))


def test_a_stream_may_wait_with_256_events_and_lags_with_one_more() -> None:
    subscription = Subscription("job")
    subscription.offer(event(number) for number in range(256))
    assert (len(subscription.waiting), subscription.lagging) == (256, False)
    subscription.offer([event(256)])
    assert (subscription.waiting, subscription.lagging) == ([], True)
    subscription.offer([event(257)])
    assert subscription.take() == ([], True), "nothing after a gap"
    assert subscription.take() == ([], False)


def test_an_event_on_the_wire() -> None:
    told = encode(event(7)).decode()
    assert told.startswith('id: 7\nevent: log\ndata: {"sequence":7,"created_at":"2026-01-05T10:00:00Z","attempt":1,')
    assert told.endswith("}\n\n")
    assert told.count("\n") == 4


@pytest.mark.parametrize(("value", "after"), [("", 0), ("0", 0), ("007", 7), ("12", 12)])
def test_a_stream_goes_on_after_the_last_event_id(value: str, after: int) -> None:
    assert parse_last_event_id(value) == after


@pytest.mark.parametrize("value", ["-1", "1.0", " 1", "٣", "x"])
def test_another_last_event_id_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_last_event_id(value)
