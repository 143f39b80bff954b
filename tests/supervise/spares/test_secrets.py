"""A spare without an order, looked at from outside: variables, open files and memory hold no secret and no job."""

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from bitwright.job_states import JobStatus
from tests.supervise.bench import Running
from tests.supervise.spares.conftest import MODULE, Waiting
from workers.supervise.spares.pool import Spares

CHUNK = 16 << 20


def writable_memory(pid: int) -> Iterator[bytes]:
    """All that a process has written or could write, in pieces that overlap by a page."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if found is None:
                continue
            begin, end = (int(number, 16) for number in found.groups())
            for start in range(begin, end, CHUNK):
                try:
                    yield os.pread(memory.fileno(), min(CHUNK + 4096, end - start), start)
                except OSError:  # pages of a device
                    break


def found_in(pid: int, needles: dict[str, bytes]) -> set[str]:
    """Names of the needles that are in a process's variables or memory."""
    pieces = (Path(f"/proc/{pid}/environ").read_bytes(), Path(f"/proc/{pid}/cmdline").read_bytes())
    return {
        name
        for source in (pieces, writable_memory(pid))
        for piece in source
        for name in needles
        if needles[name] in piece
    }


def open_files(pid: int) -> list[str]:
    return sorted(os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize(
    "module", [MODULE, pytest.param("workers.child.attempt", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_a_spare_knows_no_secret_and_nothing_of_a_job(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """It is born while another tenant's job runs, by a worker that holds secrets in its variables and its memory."""
    planted = {name: secrets.token_hex(24) for name in ("database", "broker", "token", "key", "password", "metadata")}
    for name, variable in {
        **{"database": "BITWRIGHT_DATABASE_URL", "broker": "BITWRIGHT_BROKER_URL", "token": "HF_TOKEN"},
        **{"key": "AWS_SECRET_ACCESS_KEY", "password": "PGPASSWORD"},
    }.items():
        monkeypatch.setenv(variable, planted[name])
    context = waiting.bench.context
    settings = context.settings.model_copy(update={"hub_token": SecretStr(planted["token"])})
    spares = Spares(module, context.worker_id, settings, waiting.spares._capacity)
    bench = replace(waiting.bench, context=replace(context, settings=settings, spares=spares))
    job_id = bench.submit("once:hang", metadata={"script": "hang", "secret": planted["metadata"]})
    needles = {name: value.encode() for name, value in planted.items()}
    needles |= {"job": job_id.encode(), "tenant": bench.tenant_id.encode(), "model": str(bench.model).encode()}
    running = Running(bench, bench.claim())
    running.log_event("hanging")
    try:
        waiting = replace(waiting, bench=bench, spares=spares)
        spare = waiting.spare()
        assert found_in(spare.pid, needles) == set()
        (guard,) = Path(f"/proc/{spare.pid}/task/{spare.pid}/children").read_text().split()
        assert found_in(int(guard), needles) == set()
        files = open_files(spare.pid)
        folder = settings.workspace_dir / "spares" / context.worker_id
        kinds = [file.partition(":")[0] for file in files if not file.startswith((str(folder), "/dev/", "anon_inode"))]
        assert sorted(kinds) == ["pipe", "pipe", "socket"], files  # control, report, order
        # The same look finds a job where there is one.
        attempt = {"job": job_id.encode(), "metadata": planted["metadata"].encode()}
        (pid,) = _attempts(job_id)
        assert found_in(pid, attempt) == set(attempt)
        if module != MODULE:
            held = Path(f"/proc/{spare.pid}/status").read_text()
            assert int(re.findall(r"VmHWM:\s+(\d+) kB", held)[0]) << 10 < 1 << 30
    finally:
        bench.cancel(job_id)
        assert running.wait() is JobStatus.CANCELLED
        spares.close()


def _attempts(job_id: str) -> list[int]:
    """Processes that were started for a job, without their guards."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_text()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if job_id in line and parent == os.getpid():
                found.append(int(entry.name))
    return found
