"""Reads, submissions and pages of lists that the API serves a second, of this version and of another one in turns.

    git worktree add /tmp/before 4d50438
    python -m benchmarks.service.load --tree /tmp/before --rounds 3 --seconds 5

Starts PostgreSQL, and for each version an API of its own on a database of its own with the same jobs. A round asks one
version after the other: at most as many as it can (`saturation`: 16 connections that read a job, 8 that submit, 8 that
list), and then at a fixed rate (`--reads` and `--submissions` a second together), where latencies and errors count. The
generator shares the machine. Prints a JSON line a round, and one of medians and of the medians of the rounds' ratios.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import httpx
from sqlalchemy import URL

from benchmarks.service.connections import connected
from benchmarks.service.running import postgres_pid, prepared, running_api
from tests import servers

JOB = {"model": "org/model", "method": "rtn", "bits": 4, "metadata": {"commit": "abc", "team": "x"}}
READERS, SUBMITTERS, LISTERS = 16, 8, 8
Call = Callable[[], Awaitable[int]]
"""A request; the status of its answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", default="", help="folder of another version; empty: this one alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of saturation; 0: none")
    parser.add_argument("--rate-seconds", type=float, default=5.0, help="of the fixed rate")
    parser.add_argument("--jobs", type=int, default=200, help="in each database at the start")
    parser.add_argument("--reads", type=float, default=100.0, help="a second, at the fixed rate")
    parser.add_argument("--submissions", type=float, default=10.0, help="a second, at the fixed rate")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        postgres = stack.enter_context(servers.postgres_server())
        trees = {"this": "", **({"other": arguments.tree} if arguments.tree else {})}
        services = {name: begin_service(stack, postgres, tree, arguments.jobs) for name, tree in trees.items()}
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(arguments.rounds):
            order = list(services) if number % 2 == 0 else list(services)[::-1]
            told = {name: asyncio.run(_measure(services[name], arguments)) for name in order}
            rounds.append(told)
            print(json.dumps({"round": number, **told}), flush=True)
        print(json.dumps(_summary(rounds)))


@dataclass(frozen=True)
class Service:
    """An API with a key and jobs of its own; process ids of it and of the PostgreSQL behind it."""

    address: str
    key: str
    pid: int
    postgres: int


def begin_service(stack: ExitStack, postgres: URL, tree: str, jobs: int) -> Service:
    """An API on a database of its own, which has its version's schema and so many jobs."""
    url = servers.text(stack.enter_context(servers.postgres_database(postgres)))
    key = prepared(url, "load", tree=tree)
    api = stack.enter_context(running_api(url, tree=tree))
    with httpx.Client(base_url=api.address, headers={"Authorization": f"Bearer {key}"}, timeout=300) as client:
        for number in range(jobs):
            client.post("/v1/jobs", json={**JOB, "seed": number}).raise_for_status()
    return Service(api.address, key, api.pid, postgres_pid(postgres))


async def _measure(measured: Service, arguments: argparse.Namespace) -> dict[str, Any]:
    async with connected(measured.address, measured.key) as service:
        _, page = await service.ask("GET", "/v1/jobs?limit=50")
        ids = [job["id"] for job in json.loads(page)["items"]]
        turn = iter(range(10**9))

        async def read() -> int:
            return (await service.ask("GET", f"/v1/jobs/{ids[next(turn) % len(ids)]}"))[0]

        async def submit() -> int:
            return (await service.ask("POST", "/v1/jobs", {**JOB, "seed": next(turn)}))[0]

        async def listed() -> int:
            return (await service.ask("GET", "/v1/jobs?limit=50"))[0]

        told: dict[str, Any] = {}
        if seconds := arguments.seconds:
            told = {
                "reads_a_second": await _saturate(read, READERS, seconds),
                "submissions_a_second": await _saturate(submit, SUBMITTERS, seconds),
                "lists_a_second": await _saturate(listed, LISTERS, seconds),
            }
        rates = ((read, arguments.reads), (submit, arguments.submissions))
        results = await asyncio.gather(*(_at_rate(call, rate, arguments.rate_seconds) for call, rate in rates))
        told["at_rate"] = dict(zip(("reads", "submissions"), results, strict=True))
        return told


async def _saturate(call: Call, connections: int, seconds: float) -> float:
    """Answers a second while so many callers ask one after the other."""
    ends, answers = time.perf_counter() + seconds, 0

    async def caller() -> None:
        nonlocal answers
        while time.perf_counter() < ends:
            status = await call()
            if status >= 300:
                raise RuntimeError(f"an answer of status {status}")
            answers += 1

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(connections)))
    return round(answers / (time.perf_counter() - started), 1)


async def _at_rate(call: Call, rate: float, seconds: float) -> dict[str, Any]:
    """Milliseconds of calls that begin at fixed times, whether or not earlier ones have ended, and how many failed."""
    started, tasks = time.perf_counter(), []

    async def one(due: float) -> float | None:
        try:
            status = await call()
        except (OSError, asyncio.IncompleteReadError):
            return None
        return (time.perf_counter() - due) * 1000 if status < 300 else None

    for number in range(int(rate * seconds)):
        due = started + number / rate
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(due)))
    taken = await asyncio.gather(*tasks)
    good = [milliseconds for milliseconds in taken if milliseconds is not None]
    late = quantiles(good, n=100)
    return {"median": round(median(good), 1), "p99": round(late[-1], 1), "errors": len(taken) - len(good)}


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    names = [name for name in rounds[0]["this"] if name.endswith("_a_second")]
    told: dict[str, Any] = {"medians": {}, "ratios": {}}
    for version in rounds[0]:
        told["medians"][version] = {name: median(each[version][name] for each in rounds) for name in names}
    if "other" in rounds[0]:
        ratios = {name: [each["this"][name] / each["other"][name] for each in rounds] for name in names}
        told["ratios"] = {name: round(median(values), 2) for name, values in ratios.items()}
        told["each"] = {name: [round(value, 2) for value in values] for name, values in ratios.items()}
    return told


if __name__ == "__main__":
    main()
