"""Event streams that stay open while jobs go on: every event comes to every stream, and the API's memory stays.

    python -m benchmarks.service.streams --streams 500 --seconds 600

Starts PostgreSQL and `bitwright api`, ten jobs that a hand which does a worker's writes lets write a block each second,
and streams of one key, as many to each job. Prints a JSON line every half minute, the memory of the API's process, and
one at the end: the events that streams got and should have got, and how many streams ended before.
"""

import argparse
import asyncio
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from app.store.attempts import AttemptWriter, Claim, claim
from app.store.session import Database
from benchmarks.service.load import JOB
from benchmarks.service.running import RunningApi, prepared, running_api
from bitwright.events import BlockEvent
from bitwright.job_states import DeviceClass
from tests import servers

LATE_SECONDS = 5.0
"""Time that the last events have on their way."""


@dataclass
class Stream:
    """A stream of a job and the numbers of the events that came, which have no gaps."""

    job_id: str
    first: int = 0
    last: int = 0
    gaps: int = 0
    ended: bool = False

    def take(self, line: bytes) -> None:
        """Note an event's number."""
        if not line.startswith(b"id:"):
            return
        number = int(line[3:])
        self.gaps += self.last != 0 and number != self.last + 1
        self.first, self.last = self.first or number, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--jobs", type=int, default=10)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        postgres = stack.enter_context(servers.postgres_server())
        url = servers.text(stack.enter_context(servers.postgres_database(postgres)))
        key = prepared(url, "load")
        most = str(arguments.streams)
        api = stack.enter_context(running_api(url, MAX_STREAMS=most, MAX_STREAMS_OF_KEY=most))
        with httpx.Client(base_url=api.address, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
            for number in range(arguments.jobs):
                client.post("/v1/jobs", json={**JOB, "seed": number}).raise_for_status()
        database = Database(url)
        held = [_claimed(database) for _ in range(arguments.jobs)]
        print(json.dumps(asyncio.run(_follow(api, key, database, held, arguments))))
        database.close()


def _claimed(database: Database) -> Claim:
    with database.transaction() as session:
        held = claim(session, worker_id="worker", device_class=DeviceClass.CPU, lease_seconds=86_400)
    assert held is not None
    return held


async def _follow(
    api: RunningApi, key: str, database: Database, held: list[Claim], arguments: argparse.Namespace
) -> dict[str, Any]:
    streams = [Stream(held[number % len(held)].job_id) for number in range(arguments.streams)]
    tasks = [asyncio.create_task(_read(api.address, key, stream)) for stream in streams]
    await asyncio.sleep(LATE_SECONDS)
    started, written, memory = time.monotonic(), 0, [_megabytes(api.pid)]
    while time.monotonic() - started < arguments.seconds:
        await asyncio.to_thread(_write, database, held, written)
        written += 1
        if written % 30 == 0:
            memory.append(_megabytes(api.pid))
            print(json.dumps({"seconds": round(time.monotonic() - started), "megabytes": memory[-1]}), flush=True)
        await asyncio.sleep(max(started + written - time.monotonic(), 0))
    await asyncio.sleep(LATE_SECONDS)
    ended = sum(stream.ended for stream in streams)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "streams": len(streams),
        "ended": ended,
        "gaps": sum(stream.gaps for stream in streams),
        "blocks_written_to_each_job": written,
        "fewest_events": min(stream.last - stream.first + 1 for stream in streams),
        "last_numbers": sorted({stream.last for stream in streams}),
        "megabytes": memory,
    }


async def _read(address: str, key: str, stream: Stream) -> None:
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"GET /v1/jobs/{stream.job_id}/events HTTP/1.1\r\nHost: service\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Accept: text/event-stream\r\n\r\n".encode())
    try:
        while line := await reader.readline():
            stream.take(line)
        stream.ended = True
    finally:
        writer.close()


def _write(database: Database, held: list[Claim], number: int) -> None:
    block = BlockEvent(index=number % 30, total=30, name=f"block {number}", loss_initial=1.0, loss=0.5, seconds=1.0)
    for each in held:
        with database.transaction() as session:
            AttemptWriter(session, each.job_id, each.attempt).append([block])


def _megabytes(pid: int) -> float:
    return round(psutil.Process(pid).memory_info().rss / 1e6, 1)


if __name__ == "__main__":
    main()
