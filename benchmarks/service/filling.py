"""Jobs by the million, written into the tables themselves: as many as a service has after years.

    python -m benchmarks.service.filling URL --jobs 1000000

Five tenants, of which the first has nine tenths; 40 models, of which one has half of the jobs; three methods and a
recipe; one per thousand queued, the rest ended; labels: `ci` on half of them, `team` of ten, `commit` of its own,
`release` on one of 200, `night` on one of seven that failed, so that no other job has it.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine, insert, text

from app.domain.request.job_request import JobRequest
from app.store.ids import ALPHABET
from app.store.models import Base, Job, JobLabel
from app.store.session import Database, migrate
from app.store.tenancy.keys import ensure_tenant

ROWS = 5000
STATUSES = ["succeeded"] * 899 + ["failed"] * 70 + ["cancelled"] * 30 + ["queued"]
METHODS = [("rtn", None), ("gptq", None), ("signround", None), ("nf", "qlora")]
START = datetime(2025, 1, 1, tzinfo=UTC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    arguments = parser.parse_args()
    started = time.monotonic()
    migrate(arguments.url)
    print(json.dumps({"tenant": fill(arguments.url, arguments.jobs), "seconds": round(time.monotonic() - started, 1)}))


def fill(url: str, jobs: int) -> str:
    """Write the jobs; the id of the tenant that has most of them."""
    database = Database(url)
    with database.transaction() as session:
        tenants = [ensure_tenant(session, f"tenant-{number}").id for number in range(5)]
    write = _copy if database.engine.dialect.name == "postgresql" else _insert
    for part in _parts(tenants, jobs):
        write(database.engine, part)
    if database.engine.dialect.name == "postgresql":  # where it happens by itself; nobody does it on SQLite
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))
    database.close()
    return tenants[0]


def _parts(tenants: list[str], jobs: int) -> Iterator[dict[type[Base], list[dict[str, object]]]]:
    chance, rare = random.Random(1), random.Random(2)
    request = JobRequest.parse({"model": "org/model-0", "method": "rtn", "bits": 4}).model_dump(mode="json")
    for first in range(0, jobs, ROWS):
        rows: dict[type[Base], list[dict[str, object]]] = {Job: [], JobLabel: []}
        for number in range(first, min(first + ROWS, jobs)):
            tenant = tenants[0] if chance.random() < 0.9 else chance.choice(tenants[1:])
            model = "org/model-0" if chance.random() < 0.5 else f"org/model-{chance.randrange(40)}"
            labels = {"team": f"t{chance.randrange(10)}", "commit": f"{number:040x}"}
            labels |= {"ci": "true"} if chance.random() < 0.5 else {}
            job = _job(number, tenant, model, chance)
            labels |= {"release": "r1"} if rare.random() < 1 / 200 else {}
            labels |= {"night": "yes"} if job["status"] == "failed" and rare.random() < 1 / 7 else {}
            rows[Job].append({**job, "request": {**request, "metadata": labels}})
            owner = {"job_id": job["id"], "tenant_id": tenant}
            rows[JobLabel] += [{**owner, "name": name, "value": value} for name, value in labels.items()]
        yield rows


def _job(number: int, tenant: str, model: str, chance: random.Random) -> dict[str, object]:
    method, recipe = chance.choice(METHODS)
    status = chance.choice(STATUSES)
    created = START + timedelta(seconds=20 * number)
    ended = created + timedelta(seconds=chance.randrange(60, 6000))
    return {
        **{"id": job_id(created, number), "tenant_id": tenant, "status": status},
        **{"method": method, "recipe": recipe, "model": model, "device": "any", "priority": 0},
        **{"attempt": int(status != "queued"), "created_at": created, "available_at": created, "updated_at": ended},
        "finished_at": None if status == "queued" else ended,
        **{"started_at": None if status == "queued" else created, "cancel_requested": False, "last_event": 0},
        **{"micro_batch_divisor": 1, "blocks_done": 0, "fruitless_attempts": 0},
    }


def job_id(created: datetime, number: int) -> str:
    """An id of that time, as the store makes them, with the number in place of chance."""
    value = (int(created.timestamp() * 1000) << 80) | number
    return "job_" + "".join(ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


def _insert(engine: Engine, part: dict[type[Base], list[dict[str, object]]]) -> None:
    with engine.begin() as connection:
        for table, rows in part.items():
            if rows:
                connection.execute(insert(table), rows)


def _copy(engine: Engine, part: dict[type[Base], list[dict[str, object]]]) -> None:
    with engine.begin() as connection:
        for table, rows in part.items():
            if rows:
                _copy_rows(connection, table.__tablename__, rows)


def _copy_rows(connection: Connection, table: str, rows: list[dict[str, object]]) -> None:
    names = list(rows[0])
    cursor = connection.connection.cursor()
    with cursor.copy(f"COPY {table} ({', '.join(names)}) FROM STDIN") as copy:  # type: ignore[attr-defined]
        for row in rows:
            copy.write_row([json.dumps(row[n]) if isinstance(row[n], dict) else row[n] for n in names])


if __name__ == "__main__":
    main()
