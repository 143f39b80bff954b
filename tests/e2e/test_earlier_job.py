"""A real service: a job finetunes another job's result, whose codes ship bit for bit, through a kill and a deletion."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from app.domain.events import CheckpointEvent
from app.domain.jobs import JobStatus
from tests.e2e.installation import Installation
from tests.e2e.real_job import order_of, run_undisturbed, tensor_hashes
from tests.workers.bench import wait_for

WORKER_MODULE = "workers"
DATABASE = "sqlite"


def finetune(steps: int) -> dict[str, Any]:
    size = {"batch_size": 4, "sequence_length": 64, "learning_rate": 1e-3}
    return {"dataset": "builtin", "steps": steps, "checkpoint_every": 10, **size}


def report_of(installed: Installation, job_id: str) -> dict[str, Any]:
    job = installed.wait_for_status(job_id, "succeeded", "failed", seconds=120)
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.report is not None
    return job.report


def test_a_finetune_goes_on_from_another_jobs_result(installed: Installation, short_model: Path, tmp_path: Path) -> None:
    small = {"evaluation": {"num_samples": 2, "sequence_length": 64}}
    base: dict[str, Any] = {"method": "qa-lora", "group_size": 32, "rank": 4}
    first = installed.submit(model=str(short_model), **base, **small, finetune=finetune(10))
    trained = report_of(installed, first)
    shipped = tensor_hashes(installed, first)

    second = installed.client.submit({"base_job": first, **small, "finetune": finetune(200)}).id

    def checkpoints() -> bool:
        assert installed.job(second).status is not JobStatus.SUCCEEDED, "the job was too quick to be killed"
        return any(isinstance(event, CheckpointEvent) for event in installed.events(second))

    wait_for(checkpoints, 60, what="a checkpoint")
    order = order_of(installed, second)
    assert order.base_path is not None
    shutil.copytree(order.base_path, tmp_path / "base")
    installed.client.delete(first)
    os.kill(installed.attempt_pids(second)[0], signal.SIGKILL)

    report = report_of(installed, second)
    assert [a.error and a.error["code"] for a in installed.attempts(second)] == ["attempt_killed", None]
    assert report["base"] == {"job_id": first, "blocks_adopted": 2, "adapter_continued": True}
    assert (report["blocks_computed"], report["blocks_resumed"]) == (0, 2)
    assert report["finetuning"]["loss_before"] == trained["finetuning"]["loss_after"]
    assert report["finetuning"]["steps_resumed"] > 0
    found = tensor_hashes(installed, second)
    changed = {path for path in found if found[path] != shipped[path]}
    assert changed == {"adapter/adapter.safetensors"}, "the base ships as the same bytes"
    undisturbed = order.model_copy(update={"base_path": str(tmp_path / "base")})
    assert found == run_undisturbed(undisturbed, tmp_path / "again")
