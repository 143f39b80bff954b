"""The `openai` package's whole loop with a real service and a real worker: sent, trained, paused, resumed, loaded."""

import time
from pathlib import Path

import openai
import pytest

from tests.e2e.installation import Installation
from tests.supervise.bench import wait_for

WORKER_MODULE = "workers"
DATABASE = "sqlite"
ROW = '{"messages": [{"role": "user", "content": "Say %d"}, {"role": "assistant", "content": "%d and no more"}]}\n'


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loop_with_pause_and_resume(installed: Installation, short_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "train.jsonl"
    text.write_text("".join(ROW % (n, n) for n in range(64)))
    key = installed.new_key()
    with openai.OpenAI(base_url=f"http://127.0.0.1:{installed.port}/v1", api_key=key) as client:
        wait_for(installed.client.workers, 60, what="a worker")
        with text.open("rb") as sent:
            file = client.files.create(file=sent, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=str(short_model),
            training_file=file.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": 4}}},
            extra_body={
                "bitwright": {
                    "group_size": 32,
                    "rank": 4,
                    "evaluation": {"num_samples": 2, "sequence_length": 64},
                    "finetune": {"sequence_length": 64, "checkpoint_every": 5},
                }
            },
        )
        jobs = client.fine_tuning.jobs

        def events() -> list[str]:
            return [event.message for event in jobs.list_events(job.id, limit=100)]

        wait_for(lambda: any("Training is kept" in message for message in events()), 120, what="a checkpoint")
        asked = time.monotonic()
        jobs.pause(job.id)
        wait_for(lambda: jobs.retrieve(job.id).status == "queued", 30, what="the job given back")
        assert time.monotonic() - asked < 15
        (kept, *_) = [message for message in events() if "Training is kept" in message]
        time.sleep(3)
        paused = jobs.retrieve(job.id)
        assert (paused.status, (paused.model_extra or {})["held"]) == ("queued", True), "no worker takes it"
        jobs.resume(job.id)
        wait_for(lambda: jobs.retrieve(job.id).status in ("succeeded", "failed"), 300, what="the end")
        done = jobs.retrieve(job.id)
        assert done.status == "succeeded", done.error
        assert done.fine_tuned_model == f"jobs/{job.id}"
        report = installed.client.job(job.id).report
        assert report is not None
        assert report.finetuning is not None
        step = int(kept.rpartition(" ")[2].partition("/")[0])
        assert report.finetuning.steps_resumed >= step > 0, "it went on from the last checkpoint"
        assert report.finetuning.steps == 305, "61 of 64 rows are learned twenty times, four a step"
        (checkpoint,) = jobs.checkpoints.list(job.id)
        assert checkpoint.step_number == report.finetuning.steps_kept
        assert done.trained_tokens == report.finetuning.tokens_read
        files = {(one.format, one.path) for one in installed.client.artifacts(job.id)}
        assert ("peft", "adapter_model.safetensors") in files
