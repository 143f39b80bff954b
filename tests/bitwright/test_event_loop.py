"""The asynchronous client among other work of an event loop: it waits without threads, and ends when it is told to."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from bitwright import AsyncBitwright, AsyncJob
from bitwright.errors import CorruptCheckpoint
from bitwright.job_states import JobStatus
from tests.bitwright.cutting_proxy import CuttingProxy
from tests.bitwright.made_client import modules
from tests.bitwright.service import QUICK, Service

SEVERAL = 50


def connect(service: Service, url: str | None = None) -> AsyncBitwright:
    return AsyncBitwright(url or service.url, service.key, retry=QUICK)


async def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def new_job(client: AsyncBitwright) -> AsyncJob:
    return await client.jobs.create(model="org/name", method="rtn")


def of_the_client() -> set[str]:
    """Threads of this process but those in which the service under test answers."""
    return {thread.name for thread in threading.enumerate() if "AnyIO" not in thread.name}


def test_the_blocking_client_is_the_one_that_is_made_from_the_asynchronous_one() -> None:
    for path, content in modules().items():
        assert path.read_text(encoding="utf-8") == content, f"run make client: {path.name} is not up to date"


def test_a_cancelled_wait_closes_its_request(service: Service) -> None:
    async def steps(proxy: CuttingProxy) -> None:
        async with connect(service, proxy.url) as client:
            job = await new_job(client)
            wait = asyncio.create_task(job.wait())
            await until(lambda: any(b"/events" in text for text in proxy.heard))
            await asyncio.sleep(0.1)
            assert len(proxy._open) == 2, "the stream's connection to the proxy, and the proxy's to the service"
            began = time.monotonic()
            wait.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wait
            await until(lambda: not proxy._open)
            assert time.monotonic() - began < 2
            assert (await job.cancel()).status is JobStatus.CANCELLED, "the client goes on"

    with CuttingProxy(service.address) as proxy:
        asyncio.run(steps(proxy))


def test_an_abandoned_event_stream_is_closed_with_its_iterator(service: Service) -> None:
    async def steps(proxy: CuttingProxy) -> None:
        async with connect(service, proxy.url) as client:
            job, events = await new_job(client), None
            events = job.events()
            assert (await anext(events)).sequence == 1
            assert proxy._open
            await events.aclose()
            await until(lambda: not proxy._open)
            await job.cancel()

    with CuttingProxy(service.address) as proxy:
        asyncio.run(steps(proxy))


@pytest.mark.slow
def test_many_jobs_are_waited_for_without_a_thread_each(service: Service) -> None:
    async def steps() -> None:
        async with connect(service) as client:
            jobs = [await new_job(client) for _ in range(SEVERAL)]
            before = of_the_client()
            waits = asyncio.gather(*(job.wait() for job in jobs))
            polls = asyncio.gather(*(client.jobs.retrieve(job.id) for job in jobs))
            assert [job.status for job in await polls] == [JobStatus.QUEUED] * SEVERAL
            assert not waits.done()
            assert of_the_client() == before
            await asyncio.gather(*(client.jobs.cancel(job.id) for job in jobs))
            assert {job.status for job in await waits} == {JobStatus.CANCELLED}
            assert of_the_client() == before

    asyncio.run(steps())


def test_the_event_loop_turns_while_a_file_comes(service: Service, tmp_path: Path) -> None:
    content = bytes(4_000_000)
    job_id = service.finished({"model": "org/name", "method": "rtn"}, {"native": {"model.safetensors": content}})

    async def steps() -> None:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with connect(service) as client:
            turning = asyncio.create_task(turn())
            (path,) = await client.jobs.download(job_id, tmp_path / "checkpoint")
            assert path.read_bytes() == content
            turning.cancel()
            with suppress(asyncio.CancelledError):
                await turning
        assert turns > 100

    asyncio.run(steps())


def test_a_cancelled_download_goes_on_where_it_was(service: Service, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    job_id = service.finished({"model": "org/name", "method": "rtn"}, {"native": {"model.safetensors": content}})

    async def steps() -> None:
        received: list[int] = []
        some = asyncio.Event()

        def count(size: int) -> None:
            received.append(size)
            some.set()

        async with connect(service) as client:
            download = asyncio.create_task(client.jobs.download(job_id, tmp_path / "checkpoint", on_bytes=count))
            await some.wait()
            download.cancel()
            with pytest.raises(asyncio.CancelledError):
                await download
            there = next((tmp_path / "checkpoint").glob("*.partial")).stat().st_size
            assert 0 < there < len(content)
            received.clear()
            (path,) = await client.jobs.download(job_id, tmp_path / "checkpoint", on_bytes=count)
            assert path.read_bytes() == content
            assert sum(received) == len(content)

    asyncio.run(steps())


def test_waits_at_once_end_each_with_its_own_outcome(service: Service) -> None:
    async def steps() -> None:
        async with connect(service) as client:
            async for old in client.jobs.list(status=JobStatus.QUEUED):
                await old.cancel()
            failing, ending = await new_job(client), await new_job(client)
            waits = asyncio.gather(failing.wait(), ending.wait(), return_exceptions=True)
            service.fail(service.claim(), CorruptCheckpoint("a tensor is missing"))
            service.succeed(service.claim())
            failed, ended = await waits
            assert isinstance(failed, CorruptCheckpoint)
            assert ended is ending
            assert ending.status is JobStatus.SUCCEEDED

    asyncio.run(steps())
