"""Processor time of every combination of filters of a list, on a database with a million jobs, in milliseconds.

    python -m benchmarks.service.filling URL --jobs 1000000
    python -m benchmarks.service.filters URL --rounds 15

Reads pages of 50 as the API does, from the newest job on and from the middle of all: by status, method, model and
labels, each one that many jobs have, few, or none, and all of them together. Processor time of reader and database
together, which a machine that is busy with other things does not change as it does seconds. One connection reads all,
each page so often that PostgreSQL would have gone over to a plan for any values. Prints the slowest, then how many
pages were read and the percentiles of their medians.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sqlalchemy import text

from app.store.job_pages import JobFilters, newest_states
from app.store.session import REQUESTS, Database
from app.store.tenancy.keys import ensure_tenant
from benchmarks.service.filling import START, job_id
from bitwright.job_states import JobStatus

STATUSES = (None, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.QUEUED, JobStatus.RUNNING)
METHODS = (None, "gptq", "qlora", "awq")
MODELS = (None, "org/model-0", "org/model-9", "org/none")
FREQUENT, SOME, OF_FAILED, FEW = {"ci": "true"}, {"team": "t3"}, {"night": "yes"}, {"release": "r1"}
LABELS: tuple[Mapping[str, str], ...] = (
    *({}, FREQUENT, SOME, OF_FAILED, FEW, {"commit": f"{999_000:040x}"}, {"commit": "none"}),
    *(FREQUENT | SOME, SOME | OF_FAILED, FREQUENT | SOME | FEW, FREQUENT | {"team": "none"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slowest", type=int, default=25)
    arguments = parser.parse_args()
    database = Database(arguments.url, REQUESTS)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "tenant-0").id
    found = sorted(measured(database, tenant, arguments.rounds), key=lambda told: -float(told["median"]))
    database.close()
    for told in found[: arguments.slowest]:
        print(json.dumps(told))
    print(json.dumps({"pages": len(found)} | {name: _percentiles(found, name) for name in ("median", "most")}))


def measured(database: Database, tenant: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each combination: median and most of the rounds but the first, and jobs of its page."""
    middle = job_id(START + timedelta(seconds=20 * 500_000), 500_000)
    for status, method, model, labels in product(STATUSES, METHODS, MODELS, LABELS):
        filters = JobFilters(status, method, model, labels)
        for place, after in (("newest", None), ("deep", middle)):
            reads = [_read(database, tenant, filters, after) for _ in range(rounds)]
            spent = [milliseconds for milliseconds, _ in reads[1:]]
            shown = {"status": status and status.value, "method": method, "model": model, "labels": dict(labels)}
            yield {
                **{name: value for name, value in shown.items() if value},
                **{"from": place, "median": round(median(spent), 1), "most": round(max(spent), 1)},
                "found": reads[0][1],
            }


def _read(database: Database, tenant: str, filters: JobFilters, after: str | None) -> tuple[float, int]:
    with database.reading() as session:
        on_server = database.engine.dialect.name == "postgresql"
        server = session.scalar(text("SELECT pg_backend_pid()")) if on_server else None
        before = _processor(server)
        found = newest_states(session, tenant, filters, after, 51)
        return _processor(server) - before, len(found)


def _processor(server: int | None) -> float:
    """Milliseconds of processor that this process has used, and the server's process on this machine."""
    own = time.process_time() * 1000
    return own if server is None else own + int(Path(f"/proc/{server}/schedstat").read_text().split()[0]) / 1e6


def _percentiles(found: list[dict[str, Any]], name: str) -> dict[str, float]:
    values = quantiles([told[name] for told in found], n=100)
    return {"50": round(values[49], 1), "95": round(values[94], 1), "99": round(values[98], 1)}


if __name__ == "__main__":
    main()
