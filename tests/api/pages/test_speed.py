"""Pages with ten thousand jobs: small, and made within a tenth of a second of a processor."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert

from app.domain.request.job_request import JobRequest
from app.store.ids import new_id
from app.store.models import Artifact, Attempt, Job
from app.store.session import migrate
from bitwright.job_states import JobStatus
from tests.api.conftest import Api, make_settings, run_api
from tests.report_page.reports import full

JOBS, QUEUED = 10_000, 1_000
SECONDS, MOST_HTML = 0.1, 100_000


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service with many jobs, most of which have succeeded, each with a report of 30 blocks and 8 files."""
    folder: Path = tmp_path_factory.mktemp("busy")
    url = f"sqlite:///{folder}/pages.db"
    migrate(url)
    for api in run_api(make_settings(folder, url)):
        fill(api)
        yield api


def fill(api: Api) -> None:
    request = JobRequest.parse({"model": "org/many", "method": "rtn"}).model_dump(mode="json")
    report, now = full(30).model_dump(mode="json"), datetime.now(UTC)
    ids = [new_id("job") for _ in range(JOBS)]
    common = {"tenant_id": api.tenant_id, "request": request, "method": "rtn", "device": "any", "priority": 0}
    times = dict.fromkeys(("created_at", "available_at", "updated_at", "started_at", "finished_at"), now)
    jobs = [
        {
            **{"id": job_id, "model": f"org/many-{n % 300}", **common, **times},
            "status": JobStatus.QUEUED if n < QUEUED else JobStatus.SUCCEEDED,
            "report": None if n < QUEUED else report,
        }
        for n, job_id in enumerate(ids)
    ]
    ended = {"number": 1, "tenant_id": api.tenant_id, "worker_id": "w", "status": JobStatus.SUCCEEDED}
    attempts = [
        {"job_id": job_id, **ended, "started_at": now, "finished_at": now + timedelta(seconds=5)} for job_id in ids
    ]
    file = {"tenant_id": api.tenant_id, "format": "native", "sha256": "0" * 64, "size": 1000, "media_type": "x"}
    files = [
        {"id": new_id("art"), "job_id": job_id, "path": f"f{n}", "created_at": now, **file}
        for job_id in ids
        for n in range(8)
    ]
    with api.database.transaction() as session:
        session.execute(insert(Job), jobs)
        session.execute(insert(Attempt), attempts)
        session.execute(insert(Artifact), files)


@pytest.mark.slow
def test_ten_thousand_jobs_slow_no_page_down(busy: Api) -> None:
    browser = busy.visitor()
    done = [job["id"] for job in busy.reader.get("/v1/jobs?status=succeeded&limit=8").json()["items"]]
    paths = ["/", "/?status=queued", "/?status=succeeded", "/?method=awq", "/?model=org/many-7", "/submit", "/usage"]
    paths += [f"/jobs/{done[0]}", f"/jobs/{done[0]}/report", f"/compare?jobs={'+'.join(done)}", "/models", "/workers"]
    slow = {}
    for path in paths:
        taken = []
        for _ in range(4):
            started = time.process_time()
            answer = browser.get(path)
            taken.append(time.process_time() - started)
            assert answer.status_code == 200, path
        if not path.endswith("/report"):
            assert len(answer.content) <= MOST_HTML, path
        if min(taken) > SECONDS:
            slow[path] = min(taken)
    assert slow == {}
