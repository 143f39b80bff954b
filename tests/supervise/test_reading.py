"""A whole attempt with the worker's own child: lent to one job after another, and named in the report."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.store.models import Job
from bitwright.job_states import JobStatus
from bitwright.report import Report
from tests.supervise.bench import Bench, alive, wait_for
from tests.tiny_model import tiny_model_folder
from workers.supervise.runtimes import WarmReader, found_runtimes
from workers.supervise.work import work

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def reading_bench(sqlite_bench: Bench, tmp_path: Path) -> Iterator[Bench]:
    context = sqlite_bench.context
    reader = WarmReader(context.settings.workspace_dir)
    made = replace(
        context,
        attempt_module="workers.child.attempt",
        runtimes=found_runtimes(context.settings),
        reader=reader,
        settings=context.settings.model_copy(
            update={"model_roots": (tiny_model_folder().parent,), "lease_seconds": 60}
        ),
    )
    yield replace_context(sqlite_bench, made)
    reader.close()


def replace_context(bench: Bench, context: object) -> Bench:
    return replace(bench, context=context)  # type: ignore[arg-type]


def test_jobs_are_read_back_by_one_child(reading_bench: Bench) -> None:
    text = {"num_samples": 4, "sequence_length": 32}
    body = {"model": str(tiny_model_folder()), "method": "rtn", "bits": 4, "group_size": 32, "evaluation": text}
    context, pids = reading_bench.context, set[int]()
    jobs = []
    for verify in ("files", "block"):
        jobs.append(reading_bench.submit_body(body | {"verify": verify}))
        assert work(context, "cpu") == 1
        child = None if context.reader is None else context.reader._child
        assert child is not None
        pids.add(child.handle.pid)
    assert len(pids) == 1
    with context.database.reading() as session:
        stored = [session.get(Job, job) for job in jobs]
        assert [job.status for job in stored if job is not None] == [JobStatus.SUCCEEDED] * 2
        reports = [Report.model_validate(job.report) for job in stored if job is not None]
    assert [[(load.read, load.result) for load in report.loads] for report in reports] == [
        [("block", "loads"), ("files", "loads")],
        [("block", "loads")],
    ]
    assert context.reader is not None
    context.reader.close()
    wait_for(lambda: not any(map(alive, pids)), 10)
