"""The fetch, as the supervisor runs it, against a small Hub on loopback."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from app.domain.attempt_lines import ATTEMPT_LINE, FailedLine, FetchedLine
from app.domain.request.job_request import JobRequest
from app.hub.repository import Repository
from bitwright.errors import BitwrightError
from bitwright.events import ErrorData
from bitwright.job_states import JobStatus
from tests.api.checkpoints import CONFIG, SHAPES, safetensors
from tests.child.hub_server import COMMIT, Hub, running_hub
from tests.power_cut import PowerCut
from tests.supervise.bench import Bench
from workers.child.lifeline import REPORT_FD
from workers.disk.hub_cache import prune_models
from workers.disk.orders import AttemptOrder, FetchOrder
from workers.disk.workspace import Workspace
from workers.supervise.attempt.attempt_runner import supervise
from workers.supervise.attempt.sources import fetch_order
from workers.supervise.child_env import fetch_environment

MODEL = "org/tiny"
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors(SHAPES),
    "tokenizer.json": b"{}",
    "README.md": b"read",
}
LEFT = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"raise SystemExit('run')",
    "consolidated.safetensors": b"the same weights in their makers' layout",
    "model.fp32.safetensors": b"the same weights in another dtype",
    "model-Q4_K_M.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/params.json": b"{}",
}
"""Files of a repository that no job needs."""


def calibrated(dataset: object) -> dict[str, object]:
    """The fields of a request that calibrates with this dataset and fetches no model."""
    return {"calibration": {"dataset": dataset, "num_samples": 2, "sequence_length": 16}}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories[f"models/{MODEL}"] = FILES | LEFT
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


def test_a_model_is_pinned_and_only_safe_files_are_taken_once(online: Bench, hub: Hub) -> None:
    job_id = online.submit("fail:invalid_dataset", model=MODEL, group_size=16)
    online.run()
    assert failure(online, job_id)["code"] == "invalid_dataset", "the attempt itself ran"
    given = order(online, job_id)
    assert given.model_revision == COMMIT
    taken = {path.name for path in Path(given.model_path).iterdir() if not path.name.startswith(".")}
    assert taken == FILES.keys()
    assert sum(hub.bytes_of(name) for name in LEFT if "config" not in name) == 0
    assert not any(path.is_symlink() for path in Path(given.model_path).iterdir())
    assert hub.tokens == {"Bearer hf_secret"}
    assert [e.type for e in online.events(job_id) if e.type == "progress"]
    before = len(hub.requests)
    again = online.submit("fail:invalid_dataset", model=MODEL, group_size=16)
    online.run()
    assert [path for _, path in hub.requests[before:] if "resolve" in path] == []
    assert order(online, again).model_revision == COMMIT


def test_a_model_is_complete_by_its_mark_only_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the next job would take a marked folder as it is, whatever its files hold."""
    from workers.child import fetch as fetching

    repository = Repository("org/tiny", COMMIT, {name: len(data) for name, data in FILES.items()})
    reader = SimpleNamespace(
        repository=lambda *_: repository, read=lambda _, name, start, length: FILES[name][start : start + length]
    )

    def download(_id: str, *, local_dir: Path, **_: object) -> None:
        for name, data in FILES.items():
            (local_dir / name).write_bytes(data)

    monkeypatch.setattr(fetching, "snapshot_download", download)
    cut, touch, marked = PowerCut(monkeypatch), Path.touch, []

    def mark(path: Path) -> None:
        marked.append(cut.unsynced(path.parent))
        touch(path)

    monkeypatch.setattr(Path, "touch", mark)
    report = SimpleNamespace(write=lambda _: None)
    order = FetchOrder(model=None, models_folder=str(tmp_path))
    folder = fetching.fetch_model(order, "org/tiny", COMMIT, reader, report)  # type: ignore[arg-type]
    assert marked == [set()]
    assert folder.name == f"org--tiny@{COMMIT}"
    assert (folder / ".complete").exists()


def test_the_files_that_are_taken_of_a_repository() -> None:
    from workers.child.fetch import ALLOWED, IGNORED, TEXT_COLUMNS, VOCABULARIES

    assert set(IGNORED) == {
        *(".*", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*.msgpack", "*.h5", "*.gguf")
    }
    assert set(VOCABULARIES) < set(ALLOWED)
    assert set(ALLOWED) == {
        *("*.json", "*.txt", "*.jinja", "README.md", "tokenizer*", "*.model", "*.tiktoken", "*.spm"),
        *("*.tokenizer", "vocab.bpe", "bpe.codes"),
        *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
    }
    assert TEXT_COLUMNS == ("text", "prompt", "completion", "messages", "conversations")


@pytest.mark.slow
def test_a_retry_stays_on_its_commit_although_the_branch_moved(online: Bench, hub: Hub) -> None:
    job_id = online.submit("once:signal:SIGKILL,fail:invalid_dataset", model=MODEL, group_size=16)
    assert online.run() is JobStatus.QUEUED
    pinned = json.loads((online.workspace(job_id) / "fetched.json").read_bytes())
    assert pinned == {"model": COMMIT}
    before = len(hub.requests)
    online.run()
    assert hub.requests[before:] == [], "the pin and the files are there"


def test_a_model_that_an_attempt_reads_is_not_pruned(online: Bench) -> None:
    online.submit("hang", model=MODEL, group_size=16)
    running, root = online.start(), online.context.settings.hub_dir
    running.log_event("hanging")
    assert prune_models(root, unused_seconds=-1) == []
    online.context.stopping.set()
    running.wait()
    assert prune_models(root, unused_seconds=-1) == [f"org--tiny@{COMMIT}"]
    assert list(root.iterdir()) == []


def test_a_source_that_is_not_there_fails_the_job(online: Bench) -> None:
    job_id = online.submit("", model="org/none")
    assert online.run() is JobStatus.FAILED
    error = failure(online, job_id)
    assert (error["code"], error["field"]) == ("source_not_found", "model")
    assert error["hint"]


def fetch_errors(bench: Bench, requests: Sequence[dict[str, object]]) -> list[ErrorData | None]:
    """Errors with which the fetches of these requests end, all run by one process; None where all came."""
    folders = []
    for number, fields in enumerate(requests):
        workspace = Workspace.of(bench.context.settings.workspace_dir, f"job_{number}")
        workspace.open()
        request = JobRequest.parse(
            {"model": "/m", "method": "signround", "group_size": 16, "evaluation": None, **fields}
        )
        workspace.write(workspace.fetch_order, fetch_order(request, workspace, bench.context.settings.hub_dir))
        folders.append(str(workspace.folder))
    bench.submit("")
    environment = fetch_environment(bench.context.settings, workspace, bench.claim()) | {REPORT_FD: "1"}
    command = [sys.executable, "-m", "tests.supervise.many_fetches", *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    lines = [ATTEMPT_LINE.validate_json(line) for line in done.stdout.splitlines() if line.startswith('{"type"')]
    ends = [line for line in lines if isinstance(line, FailedLine | FetchedLine)]
    assert len(ends) == len(requests), done.stdout + done.stderr
    return [end.error if isinstance(end, FailedLine) else None for end in ends]


REFUSALS: list[tuple[dict[str, object], str, str]] = [
    ({"model": "org/none"}, "source_not_found", "model"),
    ({"model": {"source": "hub", "id": MODEL, "revision": "gone"}}, "source_not_found", "model"),
    ({"model": "org/gated"}, "source_gated", "model"),
    ({"model": "org/pickled"}, "unsafe_checkpoint", "model"),
    ({"model": "org/model-GGUF"}, "unsupported_checkpoint", "model"),
    ({"model": "org/adapter"}, "unsupported_checkpoint", "model"),
    (calibrated("org/none"), "source_not_found", "calibration.dataset"),
    (calibrated("org/columns"), "invalid_dataset", ""),
    (calibrated({"source": "hub", "id": "org/columns", "split": "test"}), "invalid_dataset", "dataset"),
]


@pytest.mark.slow
def test_what_the_hub_does_not_give(online: Bench, hub: Hub) -> None:
    hub.repositories["models/org/gated"] = FILES
    hub.gated.add("models/org/gated")
    hub.repositories["models/org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    hub.repositories["models/org/model-GGUF"] = {"a.Q4_K_M.gguf": b"GGUF", "a.Q8_0.gguf": b"GGUF"}
    hub.repositories["models/org/adapter"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    hub.repositories["datasets/org/columns"] = {"train.jsonl": b'{"a": 1}\n'}
    requests: list[dict[str, object]] = [*(fields for fields, _, _ in REFUSALS), {"model": MODEL}]
    *errors, last = fetch_errors(online, requests)
    assert last is None, "a model that is there comes through the same way"
    for error, (fields, code, field) in zip(errors, REFUSALS, strict=True):
        assert error is not None, fields
        assert (error.code, error.field or "") == (code, field), fields
        assert error.hint or code == "invalid_dataset", fields


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


def test_a_dataset_becomes_a_jsonl_head_and_its_id_is_never_a_folder_of_the_worker(
    online: Bench, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "text").mkdir(parents=True)
    (tmp_path / "org" / "text" / "train.jsonl").write_text('{"text": "of the worker"}\n' * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the attempt is a module of the tests
    rows = [{"text": f"row {i} " + "x" * 40, "junk": i} for i in range(1000)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.repositories["datasets/org/text"] = {"train.jsonl": data}
    job_id = online.submit("fail:unknown_module", method="signround", evaluation=None, **calibrated("org/text"))
    online.run()
    assert failure(online, job_id)["code"] == "unknown_module", "the attempt itself ran"
    path = order(online, job_id).calibration_path
    assert path is not None
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert lines == [{"text": row["text"]} for row in rows[: len(lines)]]
    assert 2 * 16 * 12 <= Path(path).stat().st_size < 2 * 16 * 12 + 200


def test_answers_that_look_like_times_stay_as_they_are_written(online: Bench, hub: Hub) -> None:
    """Where every one looks like a time, `datasets` gives datetimes: no zone, another way of writing, no JSON."""
    rows = [{"prompt": f"When was {n}?", "completion": f"2026-11-{n:02}T10:00:00Z"} for n in range(1, 31)]
    hub.repositories["datasets/org/dates"] = {"train.json": json.dumps(rows).encode()}
    job_id = online.submit("fail:unknown_module", method="signround", evaluation=None, **calibrated("org/dates"))
    online.run()
    path = order(online, job_id).calibration_path
    assert path is not None, failure(online, job_id)
    lines = [json.loads(line) for line in Path(path).read_text().split("\n") if line]
    assert lines == rows[: len(lines)]
    assert lines


def test_errors_of_the_tree_pass_unchanged() -> None:
    from workers.child.fetch import hub_errors

    with pytest.raises(BitwrightError, match="mine"), hub_errors("model", "x"):
        raise BitwrightError("mine")
