"""A backup of a whole service, taken while jobs come, end and are deleted, becomes a service that has all of them."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from app.store.session import migrate
from bitwright.errors import Conflict
from bitwright.job_states import FINAL_STATUSES, JobStatus
from tests import servers
from tests.e2e.installation import Installation
from tests.supervise.bench import wait_for

WORKER_MODULE = "tests.supervise.scripted_worker"
PARTS = ("valkey", "sweep", "api", "worker0", "worker1")


@pytest.fixture(params=["sqlite", "postgresql"])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two empty databases of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/first.db", f"sqlite:///{tmp_path}/second.db"
        return
    server = request.getfixturevalue("postgres")
    with ExitStack() as stack:
        first, second = (stack.enter_context(servers.postgres_database(server)) for _ in range(2))
        yield servers.text(first), servers.text(second)


def command(installation: Installation, *words: str) -> None:
    """Run an operator's command with the installation's settings."""
    line = [sys.executable, "-m", "bitwright.cli", *words]
    environment = dict(installation["api"].environment)
    finished = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def content(number: int) -> str:
    return f"file of job {number} " * 20


def script(number: int) -> str:
    return f"block,sleep:0.2,file:a.json:{content(number)},file:b.json:{number}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_service_restored_from_a_backup_under_load_has_every_job_and_artifact(
    urls: tuple[str, str], model: Path, tmp_path: Path
) -> None:
    with Installation(tmp_path / "first", model, urls[0], worker_module=WORKER_MODULE) as service:
        migrate(urls[0])
        service.start(*PARTS)
        before = {service.submit(script(number)): number for number in range(8)}
        for job_id in list(before)[:3]:
            service.wait_for_status(job_id, "succeeded", seconds=240)
        stopping, later, deleted, faults = threading.Event(), dict[str, int](), set[str](), list[BaseException]()

        def work() -> None:
            try:
                for number in range(8, 200):
                    if stopping.is_set():
                        return
                    later[service.submit(script(number))] = number
                    victim = next((job for job in before if job not in deleted), None)
                    if number % 3 == 0 and victim is not None:
                        try:
                            service.client.delete(victim)
                            deleted.add(victim)
                        except Conflict:
                            pass  # it has not ended
            except BaseException as error:
                faults.append(error)

        load = threading.Thread(target=work)
        load.start()
        command(service, "backup", str(tmp_path / "backup"))
        stopping.set()
        load.join()
        assert faults == []
        assert later, "there was no load"
        tenant = service.tenant_id
    with Installation(tmp_path / "second", model, urls[1], worker_module=WORKER_MODULE) as restored:
        command(restored, "restore", str(tmp_path / "backup"))
        restored.start(*PARTS)
        assert restored.tenant_id == tenant
        jobs = {job.id: job for job in restored.client.jobs()}
        assert set(before) - deleted <= set(jobs) <= set(before) | set(later)
        numbers = before | later
        wait_for(
            lambda: all(job.status in FINAL_STATUSES for job in restored.client.jobs()), 600, what="what was unfinished"
        )
        for job in restored.client.jobs():
            assert job.status is JobStatus.SUCCEEDED, job.error
            files = {artifact.path: artifact for artifact in restored.client.artifacts(job.id)}
            folder = tmp_path / "downloads" / job.id
            path = restored.client.download_artifact(files["a.json"], folder)
            assert path.read_text() == content(numbers[job.id])
            assert files["b.json"].sha256 == sha256(str(numbers[job.id]).encode()).hexdigest()
            sequences = [event.sequence for event in restored.client.events(job.id)]
            assert sequences == list(range(1, len(sequences) + 1))
