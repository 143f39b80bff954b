"""Bounds on what one caller costs others: filters, counts, threads, streams of one key, streams of a revoked key."""

import asyncio
import threading
import time
from collections.abc import Set
from contextlib import ExitStack

import pytest
from starlette.testclient import TestClient

from app.api.event_feed import EventFeed
from app.api.event_stream import RETRY, JobEvents, stream_events
from app.api.main import create_app
from app.api.submission.kept import Kept
from app.store.tenancy.keys import good_keys, issue_key, revoke_key
from bitwright.errors import TooManyRequests
from tests.api.conftest import Api, problem


def test_a_list_takes_as_many_filters_by_label_as_a_job_has_labels(any_api: Api) -> None:
    labels = {f"n{number}": "v" for number in range(16)}
    job_id = any_api.submit(metadata=labels)
    query = {f"metadata.{name}": value for name, value in labels.items()}
    found = any_api.reader.get("/v1/jobs", params=query).json()
    assert [job["id"] for job in found["items"]] == [job_id]
    told = problem(any_api.reader.get("/v1/jobs", params={**query, "metadata.n16": "v"}), 422, "invalid_request")
    assert told["field"] == "query.metadata"


def test_jobs_are_counted_once_for_many_readers_of_metrics() -> None:
    asked: list[float] = []

    def count() -> int:
        asked.append(time.monotonic())
        time.sleep(0.05)
        return len(asked)

    kept = Kept(count, 60)
    threads = [threading.Thread(target=kept) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (kept(), len(asked)) == (1, 1)
    again = Kept(count, 0)
    assert (again(), again(wait=True)) == (2, 2)  # not before four times as long
    again.forget()
    assert (again(), again(wait=True), again()) == (2, 3, 3)


def test_probes_answer_while_every_thread_is_at_work(api: Api) -> None:
    """Forty requests that wait, for a database for one: the process is alive, and ready as soon as that answers."""
    started, go_on = threading.Semaphore(0), threading.Event()
    application = create_app(api.settings)

    @application.get("/v1/wait")
    def wait() -> None:
        started.release()
        go_on.wait(20)

    with TestClient(application) as client:
        threads = [threading.Thread(target=client.get, args=("/v1/wait",)) for _ in range(40)]
        for thread in threads:
            thread.start()
        try:
            assert all(started.acquire(timeout=10) for _ in threads)
            begun = time.monotonic()
            for path in ("/livez", "/readyz", "/metrics"):
                assert client.get(path).status_code == 200
            assert time.monotonic() - begun < 5
        finally:
            go_on.set()
            for thread in threads:
                thread.join()


def test_one_key_has_a_share_of_the_streams() -> None:
    async def scenario() -> None:
        feed = EventFeed(lambda _: [], poll_seconds=1, max_streams=4, max_streams_of_key=2)
        with feed.subscribe("a", 0, "key_1"), feed.subscribe("b", 0, "key_1"), feed.subscribe("a", 0, "key_2"):
            with pytest.raises(TooManyRequests, match="this key"):
                feed.require_room("key_1")
            feed.require_room("key_2")
            with feed.subscribe("a", 0, "key_2"), pytest.raises(TooManyRequests, match="this process"):
                feed.require_room("key_3")
        feed.require_room("key_1")

    asyncio.run(scenario())


def test_the_share_of_a_key_is_a_quarter(api: Api) -> None:
    async def scenario() -> int:
        feed = create_app(api.settings).state.bitwright.feed
        with ExitStack() as opened:
            for number in range(1000):
                try:
                    feed.require_room("key_1")
                except TooManyRequests:
                    return number
                opened.enter_context(feed.subscribe("a", 0, "key_1"))
        return -1

    assert asyncio.run(scenario()) == api.settings.max_streams // 4


def test_a_stream_ends_with_its_key(any_api: Api) -> None:
    job_id = any_api.submit()
    with any_api.database.transaction() as session:
        revoked, kept = (issue_key(session, any_api.tenant_id, name=n, scopes=frozenset())[0].id for n in "ab")

    def good(key_ids: Set[str]) -> frozenset[str]:
        with any_api.database.reading() as session:
            return good_keys(session, key_ids)

    async def scenario() -> None:
        feed = EventFeed(lambda _: [], poll_seconds=0.02, max_streams=4, good_keys=good)
        source = JobEvents(any_api.database, any_api.tenant_id, job_id)
        first, second = (stream_events(feed, source, 1, 0, key_id) for key_id in (revoked, kept))
        for stream in (first, second):
            assert await anext(stream) == RETRY
            assert b"queued" in await anext(stream)
        polling = asyncio.create_task(feed.run())
        with any_api.database.transaction() as session:
            revoke_key(session, any_api.tenant_id, revoked)
        assert [chunk async for chunk in first] == [RETRY]
        assert feed.streams == 1
        feed.close()
        assert [chunk async for chunk in second] == [RETRY]
        polling.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))
