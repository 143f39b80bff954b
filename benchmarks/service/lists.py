"""Seconds of list queries over HTTP on a database with a million jobs: medians and 95th percentiles, in milliseconds.

    python -m benchmarks.service.filling URL --jobs 1000000
    python -m benchmarks.service.lists URL --rounds 40

Starts `bitwright api` on the database and asks for pages of 50, one after the other: without a filter, deep in the
list, by each filter and pairs of them, with hits and without, by one to sixteen labels. Prints a JSON line.
"""

import argparse
import json
import time
from statistics import median, quantiles
from typing import Any

import httpx

from app.domain.access import Scope
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant, issue_key
from benchmarks.service.running import running_api

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
    database = Database(arguments.url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "tenant-0").id
        _, key = issue_key(session, tenant, name="lists", scopes=frozenset({Scope.READ}))
    database.close()
    with running_api(arguments.url, tree=arguments.tree) as api:
        print(json.dumps(measure(api.address, key, arguments.rounds)))


def measure(address: str, key: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each query: median, 95th percentile, and the number of jobs of its first page."""
    told: dict[str, Any] = {}
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
        cursor = None
        for _ in range(100):  # twenty thousand jobs down
            page = client.get("/v1/jobs", params={"limit": 200, **({"after": cursor} if cursor else {})}).json()
            cursor = page["next_cursor"]
        for name, query in {**QUERIES, "deep": {"after": str(cursor)}}.items():
            seconds, answer = [], None
            for _ in range(rounds):
                started = time.perf_counter()
                answer = client.get("/v1/jobs", params=query)
                seconds.append((time.perf_counter() - started) * 1000)
                if answer.status_code != 200 or sum(seconds) > 60_000:
                    break
            assert answer is not None
            found = len(answer.json()["items"]) if answer.status_code == 200 else answer.json()["code"]
            late = quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0]
            told[name] = {"median": round(median(seconds), 1), "p95": round(late, 1), "found": found}
    return told


if __name__ == "__main__":
    main()
