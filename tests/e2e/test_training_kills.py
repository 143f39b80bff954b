"""A real job that finetunes, killed ten times at random moments: it ends with the weights of an undisturbed run."""

import os
import signal
from pathlib import Path
from random import Random
from time import sleep

import pytest

from app.domain.attempt_lines import AttemptLine
from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS
from bitwright.events import CheckpointEvent, ProgressEvent
from bitwright.job_states import JobStatus
from tests.e2e.installation import Installation
from tests.e2e.real_job import order_of, run_undisturbed, tensor_hashes
from tests.supervise.bench import wait_for

WORKER_MODULE = "workers"
DATABASE = "sqlite"
KILLS = 10


def submit_training(installed: Installation, model: Path, *, steps: int) -> str:
    return installed.submit(
        model=str(model),
        method="qlora",
        group_size=32,
        rank=4,
        finetune={
            "dataset": "builtin",
            "steps": steps,
            "batch_size": 4,
            "sequence_length": 64,
            "learning_rate": 1e-3,
            "checkpoint_every": 10,
        },
        evaluation={"num_samples": 2, "sequence_length": 64},
    )


def training_events(installed: Installation, job_id: str, attempt: int) -> list[AttemptLine]:
    """Events of this attempt about its training."""
    return [
        event
        for number, event in installed.numbered_events(job_id)
        if number == attempt
        and (isinstance(event, CheckpointEvent) or (isinstance(event, ProgressEvent) and event.stage == "finetune"))
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_of_a_training_job(installed: Installation, short_model: Path, tmp_path: Path) -> None:
    job_id, chosen = submit_training(installed, short_model, steps=1500), Random(10)
    for attempt in range(1, KILLS + 1):
        # At most three attempts in a row may bring nothing; a kill after the first checkpoint of one never counts.
        bearable = installed.job(job_id).fruitless_attempts < MAX_RETRIES_WITHOUT_PROGRESS

        def may_be_killed(attempt: int = attempt, bearable: bool = bearable) -> bool:
            assert installed.job(job_id).status is not JobStatus.SUCCEEDED, "the job was too quick to be killed"
            told = training_events(installed, job_id, attempt)
            return any(bearable or isinstance(event, CheckpointEvent) for event in told)

        wait_for(may_be_killed, 120, what=f"attempt {attempt} at its steps")
        sleep(chosen.uniform(0, 1.5))
        order = order_of(installed, job_id)
        os.kill(installed.attempt_pids(job_id)[0], signal.SIGKILL)
        wait_for(lambda: not installed.attempt_pids(job_id), 30, what="the end of the attempt")
    job = installed.wait_for_status(job_id, "succeeded", "failed", seconds=300)
    assert job.status is JobStatus.SUCCEEDED, job.error
    errors = [a.error and a.error["code"] for a in installed.attempts(job_id)]
    assert errors == ["attempt_killed"] * KILLS + [None]
    found = tensor_hashes(installed, job_id)
    assert any(path.startswith("adapter/") for path in found), found
    assert found == run_undisturbed(order, tmp_path)
