"""A worker's row, and the scratch folders that only it can see."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app.store.workers import forget_workers, heartbeat, list_workers
from bitwright.job_states import DeviceClass
from tests.supervise.bench import Bench, wait_for
from workers.disk.hub_cache import holding
from workers.disk.workspace import Workspace, prune
from workers.supervise import heartbeat as heartbeat_module
from workers.supervise.capacity import capacity
from workers.supervise.heartbeat import Heartbeat


def present(bench: Bench) -> list[str]:
    with bench.context.database.reading() as session:
        return [state.worker.id for state in list_workers(session)]


def test_a_worker_is_listed_while_it_lives(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "HEARTBEAT_SECONDS", 0.05)
    me = Heartbeat(bench.context)
    me.start()
    me.start()
    try:
        wait_for(lambda: present(bench) == [bench.context.worker_id])
        with bench.context.database.transaction() as session:
            forget_workers(session, unseen_seconds=-1)
        wait_for(lambda: present(bench) == [bench.context.worker_id], what="registering again")
        with bench.context.database.reading() as session:
            (state,) = list_workers(session)
        assert state.worker.device_class == "cpu"
        assert state.worker.capacity["host_memory_bytes"] == 1 << 30
    finally:
        me.stop()
    assert present(bench) == []


def test_no_fault_ends_the_heartbeat(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "HEARTBEAT_SECONDS", 0.05)
    faults = iter([RuntimeError("a driver's own")])

    def sometimes(session: Session, worker_id: str) -> bool:
        if fault := next(faults, None):
            raise fault
        return heartbeat(session, worker_id)

    monkeypatch.setattr(heartbeat_module, "heartbeat", sometimes)
    me = Heartbeat(sqlite_bench.context)
    me.start()
    try:
        wait_for(lambda: present(sqlite_bench) == [sqlite_bench.context.worker_id], what="the second heartbeat")
    finally:
        me.stop()


def test_a_worker_that_never_was_ready_leaves_nothing(bench: Bench) -> None:
    Heartbeat(bench.context).stop()
    assert present(bench) == []


def test_only_old_folders_of_ended_jobs_are_pruned(sqlite_bench: Bench, tmp_path: Path) -> None:
    root = sqlite_bench.context.settings.workspace_dir
    waiting = sqlite_bench.submit("")
    long_ago = time.time() - 100
    for name in (waiting, "job_gone", "job_young", "other"):
        workspace = Workspace.of(root, name)
        workspace.open()
        folder = workspace.folder
        if name != "job_young":
            os.utime(folder / "used", (long_ago, long_ago))
    pruned = prune(root, unused_seconds=50, in_use=lambda job_id: job_id == waiting)
    assert pruned == ["job_gone"]
    assert {folder.name for folder in root.iterdir()} == {waiting, "job_young", "other"}
    assert prune(tmp_path / "nothing", unused_seconds=0, in_use=lambda _: False) == []


def test_a_worker_prunes_what_the_store_knows_to_have_ended(sqlite_bench: Bench) -> None:
    settings = sqlite_bench.context.settings
    queued, failed = sqlite_bench.submit("", priority=-1), sqlite_bench.submit("fail:unknown_module")
    sqlite_bench.run()
    Workspace.of(settings.workspace_dir, queued).open()
    long_ago = time.time() - 8 * 86_400
    for job_id in (queued, failed):
        os.utime(sqlite_bench.workspace(job_id) / "used", (long_ago, long_ago))
    patient = settings.model_copy(update={"workspace_retention_days": 9.0})
    Heartbeat(replace(sqlite_bench.context, settings=patient))._prune()
    assert sqlite_bench.workspace(failed).exists()
    Heartbeat(sqlite_bench.context)._prune()
    assert not sqlite_bench.workspace(failed).exists()
    assert sqlite_bench.workspace(queued).exists()


def test_a_worker_prunes_models_that_nobody_has_used_for_long(sqlite_bench: Bench) -> None:
    settings = sqlite_bench.context.settings
    names = ["org--held@1", "org--old@1", "org--young@1"]
    for name, days in zip(names, (40, 40, 20), strict=True):
        with holding(settings.hub_dir / name):
            pass
        then = time.time() - days * 86_400
        os.utime(settings.hub_dir / name / ".used", (then, then))
    with holding(settings.hub_dir / names[0]):
        Heartbeat(sqlite_bench.context)._prune()
    assert sorted(path.name for path in settings.hub_dir.iterdir()) == ["org--held@1", "org--young@1"]
    eager = settings.model_copy(update={"hub_retention_days": 15.0})
    Heartbeat(replace(sqlite_bench.context, settings=eager))._prune()
    assert [path.name for path in settings.hub_dir.iterdir()] == ["org--held@1"]


def test_capacity_of_this_machine(tmp_path: Path) -> None:
    found = capacity("cpu", tmp_path / "scratch")
    assert found.device is DeviceClass.CPU
    assert found.device_name is None
    assert 1 << 28 < found.host_memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found.disk_bytes <= found.disk_total_bytes
