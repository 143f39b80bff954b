"""Processor time of one request, of this version and of another one in turns: less disturbed by neighbours than rates.

    git worktree add /tmp/before 4d50438
    python -m benchmarks.service.processor_time --tree /tmp/before --rounds 5

Starts PostgreSQL, and for each version an API of its own on a database of its own with the same jobs. A round asks one
version after the other, over one connection, to read a job, to queue one and for a page of 50, so many times each.
Prints a JSON line a round, and one of medians: milliseconds of the API's process, of all of PostgreSQL's, and of the
generator.
"""

import argparse
import asyncio
import json
import time
from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks.service.connections import Connections, connected
from benchmarks.service.load import JOB, Service, begin_service
from benchmarks.service.running import processor_seconds
from tests import servers

KINDS = ("read", "submission", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", default="", help="folder of another version; empty: this one alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=300, help="of each kind in a round")
    parser.add_argument("--jobs", type=int, default=200, help="in each database at the start")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        postgres = stack.enter_context(servers.postgres_server())
        trees = {"this": "", **({"other": arguments.tree} if arguments.tree else {})}
        services = {name: begin_service(stack, postgres, tree, arguments.jobs) for name, tree in trees.items()}
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(arguments.rounds):
            order = list(services) if number % 2 == 0 else list(services)[::-1]
            rounds.append({name: asyncio.run(_measure(services[name], arguments.requests)) for name in order})
            print(json.dumps({"round": number, **rounds[-1]}), flush=True)
        print(json.dumps({"medians": {name: _medians([each[name] for each in rounds]) for name in services}}))


async def _measure(service: Service, requests: int) -> dict[str, Any]:
    async with connected(service.address, service.key) as connections:
        _, page = await connections.ask("GET", "/v1/jobs?limit=50")
        ids = [job["id"] for job in json.loads(page)["items"]]
        told = {}
        for kind in KINDS:
            before = _spent(service)
            for number in range(requests):
                await _ask(connections, kind, ids[number % len(ids)], number)
            spent = [after - at for after, at in zip(_spent(service), before, strict=True)]
            told[kind] = {
                name: round(seconds * 1000 / requests, 3)
                for name, seconds in zip(("api", "postgresql", "generator"), spent, strict=True)
            }
        return told


async def _ask(connections: Connections, kind: str, job_id: str, number: int) -> None:
    if kind == "submission":
        status, _ = await connections.ask("POST", "/v1/jobs", {**JOB, "seed": number})
    else:
        status, _ = await connections.ask("GET", f"/v1/jobs/{job_id}" if kind == "read" else "/v1/jobs?limit=50")
    if status >= 300:
        raise RuntimeError(f"an answer of status {status}")


def _spent(service: Service) -> tuple[float, float, float]:
    """Seconds of processor time so far: the API's, PostgreSQL's, ours."""
    return processor_seconds(service.pid), processor_seconds(service.postgres), time.process_time()


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        kind: {name: round(median(each[kind][name] for each in rounds), 3) for name in rounds[0][kind]}
        for kind in KINDS
    }


if __name__ == "__main__":
    main()
