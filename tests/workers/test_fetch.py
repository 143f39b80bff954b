"""The fetch, as the supervisor runs it, against a small Hub on loopback."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.domain.errors import BitwrightError
from app.domain.events import AttemptOrder
from app.domain.jobs import JobStatus
from tests.workers.bench import Bench
from tests.workers.hub_server import COMMIT, Hub, running_hub
from workers.supervisor import supervise

MODEL = "org/tiny"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"raise SystemExit('run')",
    "README.md": b"read",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories[f"models/{MODEL}"] = FILES
        yield hub


@pytest.fixture
def online(sqlite_bench: Bench, hub: Hub) -> Bench:
    """A worker that may use this Hub, with a token."""
    changed = {"hub_enabled": True, "hub_endpoint": hub.url, "hub_token": SecretStr("hf_secret")}
    settings = sqlite_bench.context.settings.model_copy(update=changed)
    return replace(sqlite_bench, context=replace(sqlite_bench.context, settings=settings))


def order(bench: Bench, job_id: str) -> AttemptOrder:
    return AttemptOrder.model_validate_json((bench.workspace(job_id) / "order.json").read_bytes())


def failure(bench: Bench, job_id: str) -> dict[str, object]:
    error = bench.attempts(job_id)[0].error
    assert error is not None
    return dict(error)


def test_a_model_is_pinned_and_only_safe_files_are_taken(online: Bench, hub: Hub) -> None:
    job_id = online.submit("fail:invalid_dataset", model=MODEL)
    online.run()
    assert failure(online, job_id)["code"] == "invalid_dataset", "the attempt itself ran"
    given = order(online, job_id)
    assert given.model_revision == COMMIT
    taken = {path.name for path in Path(given.model_path).iterdir() if not path.name.startswith(".")}
    assert taken == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not any(path.is_symlink() for path in Path(given.model_path).iterdir())
    assert hub.tokens == {"Bearer hf_secret"}
    assert [e.type for e in online.events(job_id) if e.type == "progress"]


def test_a_second_job_downloads_nothing(online: Bench, hub: Hub) -> None:
    online.submit("fail:invalid_dataset", model=MODEL)
    online.run()
    before = len(hub.requests)
    again = online.submit("fail:invalid_dataset", model=MODEL)
    online.run()
    assert [path for _, path in hub.requests[before:] if "resolve" in path] == []
    assert order(online, again).model_revision == COMMIT


def test_a_retry_stays_on_its_commit_although_the_branch_moved(online: Bench, hub: Hub) -> None:
    job_id = online.submit("once:signal:SIGKILL,fail:invalid_dataset", model=MODEL)
    assert online.run() is JobStatus.QUEUED
    pinned = json.loads((online.workspace(job_id) / "fetched.json").read_bytes())
    assert pinned == {"model": COMMIT}
    before = len(hub.requests)
    online.run()
    assert hub.requests[before:] == [], "the pin and the files are there"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "org/none"}, "source_not_found"),
        ({"model": {"source": "hub", "id": MODEL, "revision": "gone"}}, "source_not_found"),
        ({"model": "org/gated"}, "source_forbidden"),
        ({"model": "org/pickled"}, "unsafe_checkpoint"),
    ],
)
def test_what_the_hub_does_not_give(online: Bench, hub: Hub, fields: dict[str, object], code: str) -> None:
    hub.repositories["models/org/gated"] = FILES
    hub.gated.add("models/org/gated")
    hub.repositories["models/org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    job_id = online.submit("", **fields)
    assert online.run() is JobStatus.FAILED
    error = failure(online, job_id)
    assert error["code"] == code
    assert error["field"] == "model"
    assert error["hint"]


def test_a_hub_that_is_away_is_tried_again_later(online: Bench, hub: Hub) -> None:
    hub.broken = True
    job_id = online.submit("", model=MODEL)
    assert online.run() is JobStatus.QUEUED
    assert failure(online, job_id)["code"] == "unavailable"


def test_an_address_where_nobody_listens_is_unavailable(online: Bench) -> None:
    settings = online.context.settings.model_copy(update={"hub_endpoint": "http://127.0.0.1:1"})
    job_id = online.submit("", model=MODEL)
    assert supervise(replace(online.context, settings=settings), online.claim()) is JobStatus.QUEUED
    assert failure(online, job_id)["code"] == "unavailable"


def dataset_job(bench: Bench, dataset: object) -> str:
    calibration = {"dataset": dataset, "num_samples": 2, "sequence_length": 16}
    return bench.submit("fail:unknown_module", method="signround", calibration=calibration, evaluation=None)


def test_a_dataset_becomes_a_jsonl_head(online: Bench, hub: Hub) -> None:
    rows = [{"text": f"row {i} " + "x" * 40, "junk": i} for i in range(1000)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.repositories["datasets/org/text"] = {"train.jsonl": data}
    job_id = dataset_job(online, "org/text")
    online.run()
    assert failure(online, job_id)["code"] == "unknown_module", "the attempt itself ran"
    path = order(online, job_id).calibration_path
    assert path is not None
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert lines == [{"text": row["text"]} for row in rows[: len(lines)]]
    assert 2 * 16 * 12 <= Path(path).stat().st_size < 2 * 16 * 12 + 200


def test_an_id_is_never_a_folder_of_the_worker(
    online: Bench, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "text").mkdir(parents=True)
    (tmp_path / "org" / "text" / "train.jsonl").write_text('{"text": "of the worker"}\n' * 100)
    monkeypatch.chdir(tmp_path)
    hub.repositories["datasets/org/text"] = {"train.jsonl": b'{"text": "of the Hub"}\n' * 100}
    job_id = dataset_job(online, "org/text")
    online.run()
    path = order(online, job_id).calibration_path
    assert path is not None
    assert "of the Hub" in Path(path).read_text()
    assert "of the worker" not in Path(path).read_text()


@pytest.mark.parametrize(
    ("dataset", "code"),
    [
        ("org/none", "source_not_found"),
        ("org/columns", "invalid_dataset"),
        ({"source": "hub", "id": "org/columns", "split": "test"}, "invalid_dataset"),
    ],
)
def test_datasets_that_cannot_be_used(online: Bench, hub: Hub, dataset: object, code: str) -> None:
    hub.repositories["datasets/org/columns"] = {"train.jsonl": b'{"a": 1}\n'}
    job_id = dataset_job(online, dataset)
    assert online.run() is JobStatus.FAILED
    assert failure(online, job_id)["code"] == code


def test_errors_of_the_tree_pass_unchanged() -> None:
    from workers.fetch import hub_errors

    with pytest.raises(BitwrightError, match="mine"), hub_errors("model", "x"):
        raise BitwrightError("mine")
