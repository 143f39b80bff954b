"""The spares of a worker: how many, from when on, and when they end; with real processes that import nothing."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from app.settings import Settings
from bitwright.job_states import DeviceClass
from tests.supervise.bench import CPU, alive, wait_for
from tests.supervise.spares.conftest import MODULE, Waiting
from workers.supervise.capacity import Capacity
from workers.supervise.spares import pool
from workers.supervise.spares.pool import Spares, leaves_room, spares_of

GPU = replace(CPU, device=DeviceClass.CUDA, device_memory_bytes=80 << 30)


@pytest.mark.parametrize(
    ("memory", "said", "expected"),
    [
        (15_900_000_000, None, 0),
        (16_000_000_000, None, 1),
        (15 << 30, 3, 3),
        (1 << 40, None, 1),
        (1 << 40, 0, 0),
    ],
)
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_number_of_spares(tmp_path: Path, device: Capacity, memory: int, said: int | None, expected: int) -> None:
    settings = Settings(data_dir=tmp_path).model_copy(update={"spares": said})
    assert spares_of(settings, replace(device, host_memory_bytes=memory)) == expected


@pytest.mark.parametrize(
    ("host", "device", "cpu", "gpu"),
    [
        (0, 0, True, True),
        (31 << 30, 0, True, True),  # twice that and 1 GiB of 64
        (32 << 30, 0, False, False),
        (16 << 30, 15 << 30, True, True),
        (16 << 30, 16 << 30, False, True),  # on a CPU all of it is the host's
        (0, 39 << 30, False, True),
        (0, 40 << 30, False, False),  # twice that and 600 MB of 80 GiB
    ],
)
def test_room_for_a_job_beside_a_spare(host: int, device: int, cpu: bool, gpu: bool) -> None:
    needed = {"host_memory_bytes": host, "device_memory_bytes": device}
    assert leaves_room(needed, replace(CPU, host_memory_bytes=64 << 30), 1) is cpu
    assert leaves_room(needed, replace(GPU, host_memory_bytes=64 << 30), 1) is gpu


def test_the_sizes_and_times_of_spares() -> None:
    expected = {
        **{"ENOUGH_MEMORY": 16_000_000_000, "HOST_BYTES": 1 << 30, "DEVICE_BYTES": 600_000_000},
        **{"OLDEST_SECONDS": 3600.0, "LOOK_SECONDS": 60.0, "AGAIN_SECONDS": 60.0, "LATER_SECONDS": 10.0, "MARGIN": 2.0},
    }
    assert {name: getattr(pool, name) for name in expected} == expected


def test_none_is_started_where_none_is_wanted(waiting: Waiting) -> None:
    settings = waiting.bench.context.settings.model_copy(update={"spares": 0})
    none = Spares(MODULE, "w", settings, CPU)
    none.tend()
    none.make_room({"host_memory_bytes": 1 << 40})
    assert (none.count, none.waiting, none.take()) == (0, (), None)


def test_a_spare_that_was_killed_is_buried_and_followed_by_another_after_a_while(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = waiting.spare()
    os.kill(spare.pid, signal.SIGKILL)
    wait_for(spare.child.ended, what="the end of the spare")
    waiting.spares.tend()
    assert waiting.spares.waiting == ()
    assert not alive(spare.pid)
    waiting.spares.tend()
    assert waiting.spares.waiting == (), "one that dies at once would be started for ever"
    monkeypatch.setattr(waiting.spares, "_next_start", 0.0)
    assert waiting.spare().pid != spare.pid


@pytest.mark.slow
def test_a_spare_is_renewed_when_code_or_variables_change_and_after_an_hour(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = [waiting.spare().pid]
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.0)
    waiting.spares._next_look = 0.0
    assert waiting.spare().pid == pids[0]
    for name, value in (("OMP_NUM_THREADS", "3"), ("TORCH_X", "1")):
        monkeypatch.setenv(name, value)
        pids.append(waiting.spare().pid)
    monkeypatch.setattr(pool, "stamp", lambda _: "after an upgrade")
    pids.append(waiting.spare().pid)
    monkeypatch.setattr(pool, "OLDEST_SECONDS", 0.0)
    pids.append(waiting.spare().pid)
    assert len(set(pids)) == 5
    assert [alive(pid) for pid in pids] == [False] * 4 + [True]


def test_on_few_processors_the_next_spare_leaves_them_to_the_attempt(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MANY_PROCESSORS", 1 << 20)
    waiting.spare()
    taken = waiting.spares.take()
    assert taken is not None
    waiting.spares.tend()
    assert waiting.spares.waiting == ()
    taken.end()
    waiting.spares.attempt_ended()
    waiting.spares.tend()
    assert len(waiting.spares.waiting) == 1


def test_what_the_log_of_a_lost_spare_says_is_passed_on(waiting: Waiting) -> None:
    """And its files go with it."""
    spare = waiting.spare()
    folder = waiting.bench.context.settings.workspace_dir / "spares" / waiting.bench.context.worker_id
    (folder / "1" / "spare.log").write_text("its last words")
    assert spare.last_words() == "its last words"
    code = spare.end()
    assert -code in (signal.SIGTERM, signal.SIGKILL)
    assert spare.end() == code
    assert list(folder.iterdir()) == []


def test_closing_ends_all_and_leaves_no_file(waiting: Waiting) -> None:
    spare = waiting.spare()
    waiting.spares.close()
    waiting.spares.close()
    waiting.spares.tend()
    assert not alive(spare.pid)
    assert waiting.spares.waiting == ()
    assert list((waiting.bench.context.settings.workspace_dir / "spares").iterdir()) == []


def test_folders_of_a_killed_workers_spares_are_removed_a_day_later(waiting: Waiting) -> None:
    folder = waiting.bench.context.settings.workspace_dir / "spares"
    for name, age in (("old", 90_000), ("new", 3600)):
        (folder / name).mkdir(parents=True)
        then = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (then, then))
    waiting.spare()
    assert {path.name for path in folder.iterdir()} == {"new", waiting.bench.context.worker_id}
