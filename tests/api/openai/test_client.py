"""The `openai` package against a running service: its calls, pages and errors. A hand does the worker's part."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from app.store.attempts import AttemptWriter, Wish
from bitwright.errors import InvalidDataset
from bitwright.events import CheckpointEvent, MetricEvent
from bitwright.job_states import JobStatus
from tests.bitwright.service import Service, running_service
from tests.reports import finetuning_report, report

ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
MODEL = "org/model"


def chat(rows: int) -> bytes:
    return b"".join(json.dumps(ROW).encode() + b"\n" for _ in range(rows))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=1) as made:
        yield made


def test_the_whole_loop(service: Service, client: openai.OpenAI, tmp_path: Path) -> None:
    """Send, submit, follow, pause, resume, look at the result: what a program that finetunes at OpenAI does."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(chat(40))
    with path.open("rb") as text:
        file = client.files.create(file=text, purpose="fine-tune")
    assert (file.object, file.filename, file.bytes, file.status) == (
        "file",
        "train.jsonl",
        40 * len(chat(1)),
        "processed",
    )
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.content(file.id).read() == path.read_bytes()
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        suffix="mine",
        seed=7,
        metadata={"team": "search"},
        extra_body={"bitwright": {"bits": 3, "rank": 4, "finetune": {"validation_share": 0.1}}},
    )
    assert (job.object, job.status, job.model, job.training_file) == ("fine_tuning.job", "queued", MODEL, file.id)
    assert (job.seed, job.metadata, job.fine_tuned_model) == (7, {"team": "search"}, None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, "auto")
    assert (job.model_extra or {})["user_provided_suffix"] == "mine"
    with service.client() as ours:
        asked = ours.job(job.id).request
    assert asked.finetune is not None
    assert asked.quantization is not None
    assert (asked.quantization.method, asked.quantization.bits) == ("nf", 3)
    assert asked.finetune["steps"] == 18, "36 rows of 40 are learned, twice, four a step"
    first = service.claim()
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    service.tell(first, [CheckpointEvent(step=5, total=18, milestone=0), MetricEvent(name="loss", value=1.5, step=5)])
    paused = client.fine_tuning.jobs.pause(job.id)
    assert held(paused)
    with service.database.transaction() as session:
        writer = AttemptWriter(session, first.job_id, first.attempt)
        assert writer.renew(60) is Wish.HOLD
        assert writer.release() is JobStatus.QUEUED
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert not held(client.fine_tuning.jobs.resume(job.id))
    second = service.claim()
    assert (second.job_id, second.attempt) == (job.id, 2)
    service.succeed_with(second, {"peft": {"adapter_config.json": b"{}"}}, report(finetuning=finetuning_report()))
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.error, done.fine_tuned_model) == ("succeeded", None, f"jobs/{job.id}")
    assert done.trained_tokens == finetuning_report().tokens_read
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.message for event in events] == [
        "The job has successfully completed",
        "Fine-tuning job started",
        "The job is resumed",
        "The job is queued",
        "The job is paused",
        "Step 5: training loss=1.5",
        "Training is kept up to step 5/18",
        "Fine-tuning job started",
        "The job is queued",
    ]
    (metrics,) = [event for event in events if event.type == "metrics"]
    assert metrics.data == {"step": 5, "train_loss": 1.5}
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == done.fine_tuned_model
    assert checkpoint.step_number == checkpoint.metrics.step == finetuning_report().steps_kept
    assert checkpoint.metrics.valid_loss == finetuning_report().loss_after
    with pytest.raises(openai.ConflictError) as ended:
        client.fine_tuning.jobs.cancel(job.id)
    assert ended.value.code == "illegal_transition"
    assert client.files.delete(file.id).deleted


def held(job: FineTuningJob) -> bool:
    return bool((job.model_extra or {})["held"])


@pytest.mark.slow
def test_lists_are_pages_that_the_client_turns(service: Service, client: openai.OpenAI) -> None:
    files = [client.files.create(file=(f"{n}.jsonl", chat(8)), purpose="fine-tune").id for n in range(3)]
    assert [file.id for file in client.files.list(limit=2, purpose="fine-tune")][:3] == files[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")][-3:] == files
    assert list(client.files.list(purpose="batch")) == []
    made = [
        client.fine_tuning.jobs.create(model=MODEL, training_file=files[n], metadata={"n": str(n), "of": "lists"}).id
        for n in range(3)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1, metadata={"of": "lists"})] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"of": "lists", "n": "1"})] == made[1:2]
    with service.client() as ours:
        other = ours.submit({"model": MODEL, "method": "rtn"}).id
    assert other not in [job.id for job in client.fine_tuning.jobs.list()], "it is none of this interface's"
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(other)
    assert client.fine_tuning.jobs.cancel(made[0]).status == "cancelled"
    for job_id in (made[1], made[2], other):
        with service.client() as ours:
            ours.cancel(job_id)


@pytest.mark.slow
def test_a_failed_job_says_why(service: Service, client: openai.OpenAI) -> None:
    file = client.files.create(file=chat(8), purpose="fine-tune")
    assert file.filename == "upload.jsonl"
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    service.fail(service.claim(), InvalidDataset("no row fits", field="finetune.dataset"))
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_dataset", "training_file")
    event = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert (event.level, event.message) == ("error", "The job failed: invalid_dataset: no row fits")


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"method": {"type": "dpo", "dpo": {}}}, "method.type"),
    ({"method": {"type": "reinforcement"}}, "method.type"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ({"validation_file": "upl_" + "0" * 26}, "validation_file"),
    ({"extra_body": {"bitwright": {"model": "x/y"}}}, "bitwright.model"),
]


@pytest.mark.slow
def test_what_is_not_done_here_is_told_by_its_field(client: openai.OpenAI) -> None:
    for fields, param in UNSUPPORTED:
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(model=MODEL, training_file="upl_" + "0" * 26, **fields)
        assert (refused.value.code, refused.value.param) == ("unsupported_value", param)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"training_file": "file-abc"}, "training_file", "invalid_value"),
    ({"training_file": "upl_" + "0" * 26}, "training_file", "invalid_request"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"extra_body": {"bitwright": {"bits": 99}}}, "bitwright.bits", "out_of_range"),
    ({"extra_body": {"bitwright": {"finetune": 3}}}, "bitwright.finetune", "wrong_type"),
    ({"extra_body": {"bitwright": {"finetune": {"batch_size": "x"}}}}, "batch_size", "wrong_type"),
    ({"seed": -1}, "seed", "out_of_range"),
    ({"metadata": {"x" * 65: "y"}}, "metadata", "out_of_range"),
]


@pytest.mark.slow
def test_a_wrong_request_is_told_by_its_field(client: openai.OpenAI) -> None:
    file = client.files.create(file=chat(8), purpose="fine-tune")
    for fields, param, code in WRONG:
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(**{"model": MODEL, "training_file": file.id, **fields})
        assert (refused.value.code, refused.value.type) == (code, "invalid_request_error")
        assert param in str(refused.value.param)


@pytest.mark.slow
def test_rows_are_checked_when_they_come(client: openai.OpenAI) -> None:
    wrong = {
        b'{"messages": [}': "line 2 is not JSON",
        b'{"text": "plain"}': "line 2 has no messages",
        b'{"messages": [{"role": "user", "content": "x", "weight": 3}]}': "line 2: messages.0",
    }
    for row, told in wrong.items():
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("a.jsonl", chat(1) + row), purpose="fine-tune")
        assert (refused.value.code, refused.value.param) == ("invalid_dataset", "file")
        assert told in refused.value.message
    for name, purpose, param in (("a.csv", "fine-tune", "file"), ("a.jsonl", "batch", "purpose")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=(name, chat(1)), purpose=purpose)
        assert refused.value.param == param


@pytest.mark.slow
def test_other_keys_and_other_tenants_see_nothing(service: Service, client: openai.OpenAI) -> None:
    file = client.files.create(file=chat(8), purpose="fine-tune")
    for key in ("sk-proj-0123456789", "bw_wrong"):
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=key).files.retrieve(file.id)
        assert refused.value.code == "unauthenticated"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.files.retrieve("upl_" + "0" * 26)
    assert (unknown.value.code, unknown.value.type) == ("not_found", "invalid_request_error")
