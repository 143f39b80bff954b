"""A real worker with a spare, killed with all that it started: nothing is lost or left, and the codes are the same.

They take minutes: `make test-slow` runs them.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.installation import Installation, children
from tests.e2e.real_job import (
    blocks_computed,
    order_of,
    run_undisturbed,
    submit,
    tensor_hashes,
    wait_until_quantizing,
)
from tests.supervise.bench import alive, wait_for

WORKER_MODULE = "workers"
DATABASE = "postgresql"
SETTINGS = {"SPARES": "1"}


def told(installed: Installation, event: str) -> list[int]:
    """Process ids in the worker's log lines of an event."""
    lines = installed["worker0"].log.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line["pid"] for line in found if line.get("event") == event]


def wait_for_spare(installed: Installation, number: int) -> int:
    """The id of the worker's spare number `number`."""
    wait_for(lambda: len(told(installed, "spare_started")) >= number, 120, what=f"spare {number}")
    return told(installed, "spare_started")[number - 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_spares_attempts_and_their_worker(installed: Installation, short_model: Path, tmp_path: Path) -> None:
    first = wait_for_spare(installed, 1)
    job_id = submit(installed, short_model, steps=1800)
    wait_until_quantizing(installed, job_id, 1, blocks_done=1)
    order = order_of(installed, job_id)
    assert told(installed, "spare_taken") == [first]

    # The attempt, with the next spare beside it, which goes on with the job.
    second = wait_for_spare(installed, 2)
    os.kill(first, signal.SIGKILL)
    wait_until_quantizing(installed, job_id, 2, blocks_done=1)
    assert told(installed, "spare_taken") == [first, second]

    # The worker, with the attempt and a spare: within five seconds none of their processes is alive.
    third = wait_for_spare(installed, 3)
    below = [pid for pid in children(installed["worker0"].pid) if alive(pid)]
    assert {second, third} < set(below)
    installed["worker0"].kill()
    installed.wait_until_idle(*below, seconds=5)
    installed["worker0"].start()

    # A spare that waits, killed before its job comes.
    fourth = wait_for_spare(installed, 4)
    installed.wait_for_status(job_id, "succeeded", "failed", seconds=300)
    errors = [a.error and a.error["code"] for a in installed.attempts(job_id)]
    assert errors == ["attempt_killed", "worker_lost", None]
    assert blocks_computed(installed, job_id) == [0, 1]
    assert tensor_hashes(installed, job_id) == run_undisturbed(order, tmp_path)
    waits = [pid for pid in (fourth, *told(installed, "spare_started")[4:]) if alive(pid)]
    for pid in waits:
        os.kill(pid, signal.SIGKILL)
    again = submit(installed, short_model, steps=2)
    installed.wait_for_status(again, "succeeded", "failed", seconds=200)
    assert [a.error for a in installed.attempts(again)] == [None]

    # And the worker, asked to end, ends all.
    below = [pid for pid in children(installed["worker0"].pid) if alive(pid)]
    assert installed["worker0"].stop() == 0
    installed.wait_until_idle(*below, seconds=5)
    spares = installed.folder / "data" / "workspaces" / "spares"
    assert len(list(spares.iterdir())) == 1, "of the worker that was killed; the other removed its folder"
