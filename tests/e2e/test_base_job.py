"""A real service: a job finetunes another job's result, whose codes ship bit for bit, through a kill and a deletion."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bitwright.events import CheckpointEvent
from bitwright.job_states import JobStatus
from tests.e2e.installation import Installation
from tests.e2e.real_job import tensor_hashes
from tests.supervise.bench import wait_for

WORKER_MODULE = "workers"
DATABASE = "sqlite"


def finetune(rows: Path, steps: int) -> dict[str, Any]:
    size = {"batch_size": 1, "sequence_length": 32, "validation_share": 0.2, "learning_rate": 1e-3}
    return {"dataset": str(rows), "steps": steps, "checkpoint_every": 5, **size}


def report_of(installed: Installation, job_id: str) -> dict[str, Any]:
    job = installed.wait_for_status(job_id, "succeeded", "failed", seconds=120)
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.report is not None
    return job.report


def has_checkpoint(installed: Installation, job_id: str) -> bool:
    assert installed.job(job_id).status is not JobStatus.SUCCEEDED, "the job was too quick to be killed"
    return any(isinstance(event, CheckpointEvent) for event in installed.events(job_id))


@pytest.mark.slow
def test_other_formats_are_exported_after_the_job(installed: Installation, short_model: Path) -> None:
    """And are the bytes that the job itself would have written, whatever happens to it meanwhile."""
    body: dict[str, Any] = {"model": str(short_model), "method": "rtn", "bits": 4, "group_size": 32, "evaluation": None}
    first = installed.submit(**body, formats=["compressed-tensors"])
    report_of(installed, first)
    formats = ["awq", "gptq", "merged"]
    second = installed.client.export(first, formats).id
    report = report_of(installed, second)
    assert (report["exported_from"], report["blocks_computed"]) == (first, 0)
    assert {event.event.stage for event in installed.client.events_page(second).items if event.event.type == "progress"}
    other = installed.submit(**body, formats=formats)
    report_of(installed, other)
    found, own = tensor_hashes(installed, second), tensor_hashes(installed, other)
    assert found == {path: sha256 for path, sha256 in own.items() if not path.startswith("native/")}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_finetune_goes_on_from_another_jobs_result(killed: bool, installed: Installation, short_model: Path) -> None:
    small: dict[str, Any] = {"evaluation": {"num_samples": 2, "sequence_length": 64}}
    rows = short_model.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {number} of {number * number}"}) + "\n" for number in range(200)))
    base: dict[str, Any] = {"method": "qa-lora", "group_size": 32, "rank": 4}
    first = installed.submit(model=str(short_model), **base, **small, finetune=finetune(rows, 3))
    trained = report_of(installed, first)
    shipped = tensor_hashes(installed, first)

    body = {"base_job": first, **small, "finetune": finetune(rows, 400 if killed else 20)}
    second = installed.client.submit(body).id
    wait_for((installed.workspace(second) / "order.json").exists, 60, what="an attempt")
    installed.client.delete(first)
    if killed:
        wait_for(lambda: has_checkpoint(installed, second), 60, what="a checkpoint")
        os.kill(installed.attempt_pids(second)[0], signal.SIGKILL)

    report = report_of(installed, second)
    errors = [attempt.error and attempt.error["code"] for attempt in installed.attempts(second)]
    assert errors == (["attempt_killed", None] if killed else [None])
    base_report = report["base_job"]
    (training,) = base_report.pop("training")
    assert base_report == {"job_id": first, "blocks_adopted": 2, "adapter_continued": True}
    assert (training["adapter"], training["steps"], training["folded"]) == ("qa-lora", 3, False)
    assert (report["blocks_computed"], report["blocks_resumed"]) == (0, 2 if killed else 0)
    assert report["finetuning"]["loss_before"] == trained["finetuning"]["loss_after"]
    assert (report["finetuning"]["steps_resumed"] > 0) is killed
    found = tensor_hashes(installed, second)
    changed = {path for path in found if found[path] != shipped[path]}
    assert changed == {"adapter/adapter.safetensors"}, "the base ships as the same bytes"
