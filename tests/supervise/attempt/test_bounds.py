"""Bounds of an attempt, from its birth on, and the memory that its plan gives it: with real processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidSettings
from bitwright.events import LogEvent
from bitwright.job_states import JobStatus
from tests.supervise.bench import Bench
from tests.supervise.spares.conftest import Waiting, waiting
from workers.child.needs import BESIDE_BYTES, needs_of, plan_limit
from workers.disk.handover import demand_way, hand_over, take_back
from workers.disk.orders import AttemptOrder
from workers.supervise.attempt import memory_limit
from workers.supervise.attempt.memory_limit import PREFIX, MemoryGroup

__all__ = ["waiting"]

MIB = 1 << 20
LIMIT = 192 * MIB
USER = 64_321
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server on the worker's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def with_settings(bench: Bench, **settings: object) -> Bench:
    context = bench.context
    return replace(bench, context=replace(context, settings=context.settings.model_copy(update=settings)))


def told(bench: Bench, job_id: str, name: str = "confined_0") -> dict[str, Any]:
    (event,) = [e for e in bench.events(job_id) if isinstance(e, LogEvent) and e.event == name]
    return dict(event.fields)


def demand_confined(fields: dict[str, Any]) -> None:
    assert fields["privileges"] == "1"
    assert fields["reached"] in ("ConnectionRefusedError", "PermissionError"), "the worker's loopback is out of reach"
    assert fields["core"] == 0
    assert 0 < fields["file"] < 1 << 50
    assert 0 < fields["opens"] <= 65_536


def test_an_attempt_is_confined_from_its_birth(sqlite_bench: Bench, port: int) -> None:
    job = sqlite_bench.submit(f"confined:{port},file:a.json:{{}}")
    assert sqlite_bench.run() is JobStatus.SUCCEEDED
    demand_confined(told(sqlite_bench, job))
    shared = with_settings(sqlite_bench, attempt_network="shared")
    job = shared.submit(f"confined:{port},file:a.json:{{}}")
    assert shared.run() is JobStatus.SUCCEEDED
    assert told(shared, job)["reached"] == "reached"


def test_a_spare_is_confined_before_it_has_an_order(waiting: Waiting, port: int) -> None:
    spare = waiting.spare()
    status = Path(f"/proc/{spare.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Max core file size        0" in Path(f"/proc/{spare.pid}/limits").read_text()
    job = waiting.bench.submit(f"confined:{port},file:a.json:{{}}")
    assert waiting.bench.run() is JobStatus.SUCCEEDED
    demand_confined(told(waiting.bench, job))


def test_ranks_have_one_network_that_is_not_the_workers(sqlite_bench: Bench, port: int) -> None:
    context = sqlite_bench.context
    bench = replace(sqlite_bench, context=replace(context, capacity=replace(context.capacity, devices=2)))
    script = f"confined:{port},rank:1:confined:{port},sleep:1,file:a.json:{{}}"
    job = bench.submit(script, method="signround", calibration={"num_samples": 8, "sequence_length": 32})
    assert bench.run() is JobStatus.SUCCEEDED
    first, second = (told(bench, job, f"confined_{rank}") for rank in (0, 1))
    assert first["namespace"] == second["namespace"]
    if os.getuid() == 0:
        assert first["namespace"] != os.readlink("/proc/self/ns/net")


@pytest.mark.parametrize("in_group", [True, False], ids=["in a cgroup", "by the watch"])
def test_more_memory_than_the_plan_is_the_users_error_and_not_tried_again(
    sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch, in_group: bool
) -> None:
    group = MemoryGroup.make(f"{PREFIX}probe")
    if in_group and group is None:
        pytest.skip("no cgroup can be made here")
    if group is not None:
        group.remove()
    if not in_group:
        monkeypatch.setattr(memory_limit.MemoryGroup, "make", classmethod(lambda *_, **__: None))
    bench = with_settings(sqlite_bench, attempt_memory=LIMIT)
    job = bench.submit(f"needs:1,sleep:0.5,hold:{2 * LIMIT},sleep:5,file:a.json:{{}}")
    assert bench.run() is JobStatus.FAILED
    stored = bench.job(job)
    assert stored.error is not None
    assert (stored.error["code"], len(bench.attempts(job))) == ("over_limit", 1)
    assert "its plan has 0.2" in stored.error["detail"]
    assert not list(Path("/sys/fs/cgroup/memory").rglob(f"{PREFIX}{job}*"))


def test_an_attempt_within_its_plan_is_left_alone(sqlite_bench: Bench) -> None:
    bench = with_settings(sqlite_bench, attempt_memory=4 * LIMIT)
    bench.submit(f"needs:1,sleep:0.5,hold:{LIMIT},sleep:0.5,file:a.json:{{}}")
    assert bench.run() is JobStatus.SUCCEEDED


def test_an_allocation_beyond_the_plan_fails_in_the_attempt_itself() -> None:
    code = (
        "from app.domain.request.job_request import JobRequest\n"
        "from workers.disk.orders import AttemptOrder\n"
        "from workers.child import attempt\n"
        "from workers.child.exceptions import as_bitwright_error\n"
        "request = JobRequest.parse({'model': '/m', 'method': 'rtn', 'bits': 4})\n"
        "order = AttemptOrder(job_id='j', attempt=1, request=request, model_path='', device='cpu', memory=200 << 20)\n"
        "attempt.limit_memory_to_plan(order, {'host_memory_bytes': 1})\n"
        "held = bytearray(100 << 20)\n"
        "try:\n"
        "    more = bytearray(400 << 20)\n"
        "except MemoryError as error:\n"
        "    print(attempt.within_limit(as_bitwright_error(error)).code)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout == "over_limit\n"


def test_a_plan_is_twice_the_need_and_what_libraries_take() -> None:
    needed = {"host_memory_bytes": 10 << 30, "device_memory_bytes": 6 << 30}
    assert plan_limit(needed, device="cpu", setting="plan") == (32 << 30) + BESIDE_BYTES
    assert plan_limit(needed, device="cuda", setting="plan") == (20 << 30) + BESIDE_BYTES
    assert plan_limit(needed, device="cuda", setting="plan", ranks=4) == (20 << 30) + 4 * BESIDE_BYTES
    assert plan_limit(needed, device="cpu", setting="off") is None
    assert plan_limit(needed, device="cpu", setting=7 << 30) == 7 << 30


def test_an_export_needs_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "model.safetensors").write_bytes(bytes(1000))
    request = JobRequest.parse({"model": "/m", "method": "rtn", "bits": 4})
    order = AttemptOrder(
        job_id="j", attempt=1, request=request, model_path="", base_job_path=str(tmp_path), device="cpu"
    )
    assert needs_of(order) == {"host_memory_bytes": 1000, "device_memory_bytes": 0}


def test_a_delegated_cgroup_of_version_2_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its files alone: which cgroup is whose, and what is written where."""
    service = tmp_path / "cgroup" / "system.slice" / "bitwright.service"
    (service / "worker").mkdir(parents=True)
    (service / "cgroup.subtree_control").write_text("memory pids\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/system.slice/bitwright.service/worker\n")
    make = MemoryGroup.make
    assert make(f"{PREFIX}a", tmp_path / "cgroup", membership) is None, "systemd has not given it away"
    monkeypatch.setattr("os.getxattr", lambda path, name: b"1" if (path, name) == (service, "user.delegate") else b"")
    assert make(f"{PREFIX}a", tmp_path / "cgroup", membership) is None, "the kernel has made no limit in it"
    mkdir = Path.mkdir

    def kernel(folder: Path, *_: object, **__: object) -> None:
        mkdir(folder)
        for name, content in (("memory.max", "max"), ("memory.events", "oom 1\noom_kill 3\n"), ("cgroup.procs", "")):
            (folder / name).write_text(content)

    monkeypatch.setattr(Path, "mkdir", kernel)
    group = make(f"{PREFIX}a", tmp_path / "cgroup", membership)
    assert group is not None
    group.add(17)
    group.limit_to(1 << 30)
    assert group.kills() == 3
    assert (group.folder / "memory.max").read_text() == str(1 << 30)
    assert (group.folder / "cgroup.procs").read_text() == "17"
    assert group.folder.parent == service


@root_only
def test_an_attempt_runs_as_the_user_that_its_operator_names(sqlite_bench: Bench, port: int, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o001)
    bench = with_settings(sqlite_bench, attempt_user=str(USER))
    demand_way(bench.context.settings.workspace_dir, USER)
    job = bench.submit(f"confined:{port},file:a.json:{{}}")
    assert bench.run() is JobStatus.SUCCEEDED
    fields = told(bench, job)
    demand_confined(fields)
    assert (fields["user"], fields["groups"]) == (USER, 0)
    assert fields["home"] == str(bench.workspace(job))
    (artifact,) = [each for each in bench.artifacts(job) if each.path == "a.json"]
    blobs = (bench.context.settings.data_dir / "blobs").rglob(f"*{artifact.sha256}*")
    blob = next(path for path in blobs if path.is_file())
    assert blob.stat().st_uid == 0, "what goes into the store is the worker's"


@root_only
def test_a_blob_is_copied_before_it_is_handed_over(tmp_path: Path) -> None:
    blob, folder = tmp_path / "blob", tmp_path / "job"
    folder.mkdir()
    blob.write_bytes(b"weights")
    (folder / "model").hardlink_to(blob)
    (folder / "link").symlink_to(blob)
    hand_over(folder, USER)
    assert (blob.stat().st_uid, (folder / "model").stat().st_uid) == (0, USER)
    (folder / "model").write_bytes(b"other")
    assert blob.read_bytes() == b"weights"
    take_back(folder)
    assert {path.lstat().st_uid for path in (folder, *folder.iterdir())} == {0}


@root_only
def test_a_folder_that_the_user_cannot_get_to_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "workspaces").mkdir(parents=True)
    closed.chmod(0o700)
    with pytest.raises(InvalidSettings, match="may not pass through") as refused:
        demand_way(closed / "workspaces", USER)
    assert "chmod o+x" in str(refused.value.hint)
