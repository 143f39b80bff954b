"""Seconds of list queries over HTTP on a database with a million jobs: medians and 95th percentiles, in milliseconds.

    python -m benchmarks.service.filling URL --jobs 1000000
    python -m benchmarks.service.lists URL --rounds 40

Starts `bitwright api` on the database and asks for pages of 50, one after the other: without a filter, by each filter
and several of them, with hits and without, by one to sixteen labels; each from the newest job on and from the middle
of all (`deep`). `walk` goes from page to page, so that no job of any was read before. Prints a line for each.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from statistics import median, quantiles
from typing import Any

import httpx
from sqlalchemy import make_url

from app.domain.access import Scope
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant, issue_key
from benchmarks.service.filling import START, job_id
from benchmarks.service.running import postgres_pid, processor_seconds, running_api

MOST_MILLISECONDS = 60_000
"""A query that has taken as long in all is asked no more."""
MANY = {f"metadata.n{number}": "x" for number in range(13)}
QUERIES: dict[str, dict[str, str]] = {
    "all": {},
    "status": {"status": "failed"},
    "status, rare": {"status": "queued"},
    "status, none": {"status": "running"},
    "method": {"method": "gptq"},
    "recipe": {"method": "qlora"},
    "method, none": {"method": "awq"},
    "model": {"model": "org/model-7"},
    "model, none": {"model": "org/none"},
    "method and status": {"method": "gptq", "status": "failed"},
    "method and status, none": {"method": "gptq", "status": "running"},
    "model and status": {"model": "org/model-0", "status": "cancelled"},
    "model, none, and method": {"model": "org/none", "method": "signround"},
    "frequent model and method, none": {"model": "org/model-0", "method": "awq"},
    "model and method": {"model": "org/model-9", "method": "signround"},
    "model, method and status": {"model": "org/model-9", "method": "signround", "status": "failed"},
    "label": {"metadata.team": "t3"},
    "label, one job": {"metadata.commit": f"{999_000:040x}"},
    "label, none": {"metadata.commit": "none"},
    "labels": {"metadata.team": "t3", "metadata.ci": "true"},
    "labels, none": {"metadata.team": "t3", "metadata.ci": "false"},
    "sixteen labels, none": {"metadata.team": "t3", "metadata.ci": "true", "metadata.commit": "x", **MANY},
    "label and status": {"metadata.ci": "true", "status": "failed"},
    "label and status, none": {"metadata.ci": "true", "status": "running"},
    "label, model and method": {"metadata.ci": "true", "model": "org/model-5", "method": "rtn"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tree", default="", help="folder of another version of the service, which answers instead")
    arguments = parser.parse_args()
    database, url = Database(arguments.url), make_url(arguments.url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "tenant-0").id
        _, key = issue_key(session, tenant, name="lists", scopes=frozenset({Scope.READ}))
    database.close()
    with running_api(arguments.url, tree=arguments.tree) as api:
        pids = [api.pid, *((postgres_pid(url),) if url.get_backend_name() == "postgresql" else ())]
        for told in measure(api.address, key, arguments.rounds, pids):
            print(json.dumps(told), flush=True)


def measure(address: str, key: str, rounds: int, pids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Milliseconds of each query: median, 95th percentile, processor time of all processes, and jobs of its page."""
    middle = job_id(START + timedelta(seconds=20 * 500_000), 500_000)
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
        for name, query in QUERIES.items():
            for place, more in (("newest", {}), ("deep", {"after": middle})):
                yield {"query": name, "from": place, **_repeated(client, {**query, **more}, rounds, pids)}
        yield {"query": "all", "from": "walk", **_walked(client, middle, rounds, pids)}


def _repeated(client: httpx.Client, query: dict[str, str], rounds: int, pids: Sequence[int]) -> dict[str, Any]:
    def ask() -> tuple[float, int]:
        took, page = _asked(client, query)
        return took, len(page["items"])

    return _figures(ask, rounds, pids)


def _walked(client: httpx.Client, start: str, rounds: int, pids: Sequence[int]) -> dict[str, Any]:
    cursor = start

    def ask() -> tuple[float, int]:
        nonlocal cursor
        took, page = _asked(client, {"after": cursor})
        cursor = page["next_cursor"]
        return took, len(page["items"])

    return _figures(ask, rounds, pids)


def _figures(ask: Callable[[], tuple[float, int]], rounds: int, pids: Sequence[int]) -> dict[str, Any]:
    milliseconds: list[float] = []
    before, found = sum(map(processor_seconds, pids)), 0
    while len(milliseconds) < rounds and sum(milliseconds) < MOST_MILLISECONDS:
        took, found = ask()
        milliseconds.append(took)
    spent = (sum(map(processor_seconds, pids)) - before) * 1000 / len(milliseconds)
    late = quantiles(milliseconds, n=20)[-1] if len(milliseconds) > 1 else milliseconds[0]
    told = {"median": median(milliseconds), "p95": late, "processor": spent}
    return {**{name: round(value, 1) for name, value in told.items()}, "found": found}


def _asked(client: httpx.Client, query: dict[str, str]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = client.get("/v1/jobs", params=query).raise_for_status()
    return (time.perf_counter() - started) * 1000, answer.json()


if __name__ == "__main__":
    main()
