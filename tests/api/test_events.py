"""Events: pages, streams that replay and go on, and the one poll that feeds them."""

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import httpx
import pytest
import uvicorn

from app.api.event_feed import BACKLOG, EventFeed
from app.api.event_stream import JobEvents, stream_events
from app.api.events import accepts_stream
from app.api.main import create_app
from app.store.events import StoredEvent
from bitwright.errors import InvalidDataset, TooManyRequests
from bitwright.events import LogEvent
from tests.api.conftest import Api, problem
from tests.store.samples import block, progress, wait_until

STREAM = {"Accept": "text/event-stream"}


def parse(text: str) -> list[dict[str, str]]:
    """The fields of each event; comments and `retry` dropped."""
    events = [
        dict(line.split(": ", 1) for line in part.splitlines() if line[0] != ":") for part in text.split("\n\n") if part
    ]
    return [event for event in events if "data" in event]


def test_pages_go_on_after_a_sequence(any_api: Api) -> None:
    job_id = any_api.submit()
    held = any_api.claim()
    any_api.tell(held, progress(1.0), block(0))
    page = any_api.reader.get(f"/v1/jobs/{job_id}/events?limit=3").json()
    assert [item["sequence"] for item in page["items"]] == [1, 2, 3]
    assert [item["event"]["type"] for item in page["items"]] == ["status", "status", "progress"]
    rest = any_api.reader.get(f"/v1/jobs/{job_id}/events", params={"after": page["next_after"]}).json()
    assert ([item["event"]["type"] for item in rest["items"]], rest["next_after"]) == (["block"], None)
    for bad in ("after=-1", "limit=0", "limit=1001", "after=x"):
        problem(any_api.reader.get(f"/v1/jobs/{job_id}/events?{bad}"), 422, "invalid_request")


def test_a_finished_jobs_stream_replays_and_ends(any_api: Api) -> None:
    job_id = any_api.submit()
    held = any_api.claim()
    any_api.tell(held, progress(1.0), *(LogEvent(event=f"line\n{i}") for i in range(1200)))
    any_api.succeed(held)
    url = f"/v1/jobs/{job_id}/events"
    response = any_api.reader.get(url, headers=STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parse(response.text)
    assert [int(event["id"]) for event in events] == list(range(1, 1205))
    assert json.loads(events[-1]["data"])["event"]["status"] == "succeeded"
    again = any_api.reader.get(url, headers={**STREAM, "Last-Event-ID": "1202"})
    assert [event["id"] for event in parse(again.text)] == ["1203", "1204"]
    assert any_api.reader.get(url, headers={**STREAM, "Last-Event-ID": "1204"}).status_code == 204
    problem(any_api.reader.get(url, headers={**STREAM, "Last-Event-ID": "x"}), 422, "invalid_request")


def test_a_retried_jobs_old_end_does_not_end_the_stream(api: Api) -> None:
    job_id = api.submit()
    api.fail(api.claim(), InvalidDataset("bad line"))
    api.client.post(f"/v1/jobs/{job_id}/retry")
    api.succeed(api.claim())
    events = parse(api.reader.get(f"/v1/jobs/{job_id}/events", headers=STREAM).text)
    told = [json.loads(event["data"])["event"]["status"] for event in events]
    assert told == ["queued", "running", "failed", "queued", "running", "succeeded"]


@pytest.fixture
def served(api: Api) -> Iterator[tuple[Api, httpx.Client, uvicorn.Server]]:
    """The application behind a real server, since streams are only live there."""
    application = create_app(api.settings)
    server = uvicorn.Server(
        uvicorn.Config(application, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(10, lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": f"Bearer {api.key}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=10) as client:
        yield api, client, server
    server.should_exit = True
    thread.join(15)
    assert not thread.is_alive()


def test_a_stream_is_live_and_ends_with_the_job(served: tuple[Api, httpx.Client, uvicorn.Server]) -> None:
    api, client, _ = served
    job_id = api.submit()
    seen: list[list[dict[str, str]]] = [[], [], []]

    def follow(number: int) -> None:
        with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
            text = ""
            for chunk in response.iter_text():
                text += chunk
                seen[number] = parse(text[: text.rfind("\n\n") + 2])

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(seen))]
    for thread in threads:
        thread.start()
    wait_until(10, lambda: all(len(events) == 1 for events in seen))
    assert "bitwright_event_streams 3.0" in client.get("/metrics").text
    held = api.claim()
    api.tell(held, progress(1.0))
    wait_until(10, lambda: all(len(events) == 3 for events in seen))
    for number in range(20):
        api.tell(held, block(number))
    api.succeed(held)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all([int(event["id"]) for event in events] == list(range(1, 25)) for events in seen)
    assert "bitwright_event_streams 0.0" in client.get("/metrics").text


def test_a_caller_who_leaves_frees_the_stream(served: tuple[Api, httpx.Client, uvicorn.Server]) -> None:
    api, client, _ = served
    job_id = api.submit()
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        chunks = response.iter_text()
        next(chunks)
        assert "bitwright_event_streams 1.0" in client.get("/metrics").text
    wait_until(10, lambda: "bitwright_event_streams 0.0" in client.get("/metrics").text)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("text/event-stream", True),
        ("application/json, Text/Event-Stream;q=0.5", True),
        ("text/event-stream;q=0", False),
        ("application/json", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_a_stream_must_be_asked_for(accept: str, wanted: bool) -> None:
    assert accepts_stream(accept) is wanted


class Table:
    """Events of jobs, as a store would give them; counts how often it is read."""

    def __init__(self) -> None:
        self.newest: dict[str, int] = {}
        self.reads = 0

    def read(self, cursors: Mapping[str, int]) -> Sequence[StoredEvent]:
        self.reads += 1
        return [
            StoredEvent(job_id, number, datetime.now(UTC), 1, LogEvent(event="line"))
            for job_id, after in cursors.items()
            for number in range(after + 1, self.newest.get(job_id, 0) + 1)
        ]


def test_one_poll_feeds_all_streams() -> None:
    async def scenario() -> None:
        table = Table()
        feed = EventFeed(table.read, poll_seconds=1, max_streams=3)
        with feed.subscribe("a", 0) as first, feed.subscribe("a", 0) as second, feed.subscribe("b", 5) as third:
            table.newest = {"a": 2, "b": 6}
            await feed.poll()
            for subscription, sequences in ((first, [1, 2]), (second, [1, 2]), (third, [6])):
                events, lagging = subscription.take()
                assert ([event.sequence for event in events], lagging) == (sequences, False)
            assert table.reads == 1
            await feed.poll()
            assert first.take() == ([], False)
            with pytest.raises(TooManyRequests):
                feed.require_room()
        assert feed.streams == 0

    asyncio.run(scenario())


def test_a_stream_of_a_job_that_is_deleted_ends(api: Api) -> None:
    job_id = api.submit()
    api.client.post(f"/v1/jobs/{job_id}/cancel")
    assert api.client.delete(f"/v1/jobs/{job_id}").status_code == 204

    async def scenario() -> list[bytes]:
        feed = EventFeed(lambda _: [], poll_seconds=1, max_streams=3)
        source = JobEvents(api.database, api.tenant_id, job_id)
        return [chunk async for chunk in stream_events(feed, source, newest=2, after=0)]

    assert asyncio.run(scenario()) == [b"retry: 2000\n\n"]


def test_a_slow_stream_is_told_to_replay_and_costs_no_memory() -> None:
    async def scenario() -> None:
        table = Table()
        feed = EventFeed(table.read, poll_seconds=1, max_streams=3)
        with feed.subscribe("a", 0) as subscription:
            for newest in range(BACKLOG // 2, 10 * BACKLOG, BACKLOG // 2):
                table.newest = {"a": newest}
                await feed.poll()
                assert len(subscription.waiting) <= BACKLOG
            assert subscription.take() == ([], True)
            table.newest = {"a": newest + 1}
            await feed.poll()
            assert [event.sequence for event in subscription.take()[0]] == [newest + 1]

    asyncio.run(scenario())


def test_the_poll_survives_a_store_that_fails() -> None:
    async def scenario() -> None:
        table, failures = Table(), iter([True, True])

        def read(cursors: Mapping[str, int]) -> Sequence[StoredEvent]:
            if next(failures, False):
                raise OSError("gone")
            return table.read(cursors)

        feed = EventFeed(read, poll_seconds=0.01, max_streams=3)
        poller = asyncio.create_task(feed.run())
        with feed.subscribe("a", 0) as subscription:
            table.newest = {"a": 1}
            assert await subscription.wait(5)
            assert len(subscription.take()[0]) == 1
        poller.cancel()

    asyncio.run(scenario())
