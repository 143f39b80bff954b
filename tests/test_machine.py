"""Limits that cgroups set to memory and processors: the smallest of the own one and those above it."""

import os
from pathlib import Path

import pytest

from workers.machine import available_threads, host_memory


@pytest.fixture
def inner(tmp_path: Path) -> Path:
    """The folder of the cgroup /a/b under `tmp_path`."""
    (tmp_path / "membership").write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path / "a" / "b"


def test_the_smallest_memory_limit_of_the_branch_holds(inner: Path, tmp_path: Path) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory(tmp_path, tmp_path / "membership") == machine
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("3000\n")
    (tmp_path / "memory.max").write_text("4000\n")
    assert host_memory(tmp_path, tmp_path / "membership") == 3000
    (inner / "memory.max").write_text("2000\n")
    assert host_memory(tmp_path, tmp_path / "membership") == 2000
    assert host_memory(tmp_path, tmp_path / "absent") == machine


def test_quotas_of_both_versions_limit_threads(inner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    membership = tmp_path / "membership"
    assert available_threads(tmp_path, membership) == 8
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu.max").write_text("500000 100000\n")
    assert available_threads(tmp_path, membership) == 5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_threads(tmp_path, membership) == 2
    (inner / "cpu.max").write_text("50000 100000\n")
    assert available_threads(tmp_path, membership) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_threads(tmp_path, membership) == 1
