"""Work that does not grow with what a stranger asks for, or with how often, seen from outside."""

import itertools
import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select, text

from app.store.clock import seconds_from_now
from app.store.ids import new_id
from app.store.models import Job
from app.store.session import Database
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import Api, make_settings, run_api


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """What the engine executes meanwhile."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_no_statement_or_transaction_of_a_request_lasts_for_ever(tmp_path: Path, postgres_url: str) -> None:
    """500 filters kept a database busy for minutes after the client had gone."""
    for api in run_api(make_settings(tmp_path, postgres_url)):
        database = api.client.app.state.bitwright.database  # type: ignore[attr-defined]
        for opened in (database.reading, database.transaction):
            with opened() as session:
                for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
                    assert session.execute(text(f"SHOW {name}")).scalar_one() not in ("0", 0), name


def test_many_readers_of_metrics_ask_the_database_once(api: Api) -> None:
    api.submit()
    engine = api.client.app.state.bitwright.database.engine  # type: ignore[attr-defined]
    answers, counts = [], []
    for _ in range(5):
        with statements(engine) as seen:
            answers.append(api.anonymous.get("/metrics").text)
        counts.append(sum(" job" in statement for statement in seen))
    assert counts[0] > 0
    assert counts[1:] == [0] * 4
    assert all('bitwright_jobs{status="queued"} 1.0' in answer for answer in answers)


def finished_jobs(database: Database, like: str, count: int) -> None:
    """Rows as that of a job, which ended long ago."""
    with database.transaction() as session:
        row = dict(session.execute(select(Job.__table__).where(Job.id == like)).mappings().one())
        row |= {"status": "succeeded", "lease_expires_at": None, "worker_id": None}
        rows = [{**row, "id": new_id("job")} for _ in range(count)]
        session.execute(insert(Job), rows)
        session.execute(Job.__table__.update().values(finished_at=seconds_from_now(-1_000_000)))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_retention_removes_some_thousand_jobs_in_more_than_one_transaction(any_api: Api) -> None:
    """A year of jobs in one transaction keeps writers waiting for as long as that takes."""
    from workers.sweep import Sweep  # the process that does it

    database = any_api.database
    finished_jobs(database, any_api.submit(), 2500)
    settings = any_api.settings.model_copy(update={"job_retention_days": 1})
    blobs = any_api.client.app.state.bitwright.blobs  # type: ignore[attr-defined]
    left = [_jobs(database)]
    while len(left) == 1 or left[-1] < left[-2]:
        Sweep(settings, database, blobs, "one").throw_away()
        left.append(_jobs(database))
    assert (left[0], left[-1]) == (2501, 1), "that which has not ended stays"
    assert max(before - after for before, after in itertools.pairwise(left)) <= 1000


def _jobs(database: Database) -> int:
    with database.reading() as session:
        return int(session.execute(text("SELECT count(*) FROM job")).scalar_one())


@pytest.mark.slow
def test_a_header_of_more_names_than_the_configuration_has_is_refused_unread(api: Api) -> None:
    """A header of 90 MB cost the API 0.9 GB and a minute."""
    folder = write_checkpoint(api.settings.model_roots[0] / "many")
    entry = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    header = ("{" + ",".join(f'"model.layers.0.{number:0100d}": {entry}' for number in range(200_000)) + "}").encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    began = time.monotonic()
    answer = api.client.post("/v1/jobs?dry_run=true", json={"model": str(folder), "method": "rtn", "bits": 4})
    assert answer.status_code == 422, answer.text[:300]
    assert answer.json()["code"] == "corrupt_checkpoint"
    assert "config.json" in str(answer.json()), "it says what decides how long a header may be"
    assert time.monotonic() - began < 10
