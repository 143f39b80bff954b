"""The attempt's own process: its lock, and that whatever goes wrong becomes one `failed` line."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from app.domain.attempt_lines import ATTEMPT_LINE, FailedLine
from app.domain.request.job_request import JobRequest
from bitwright.errors import InternalError, UnsafeCheckpoint
from workers.child.attempt import run_order, take_lock
from workers.child.lifeline import ATTEMPT, EXIT_FAILED, JOB_ID, REPORT_FD, ReportPipe
from workers.disk.orders import AttemptOrder
from workers.supervise.child_process import ChildProcess, child_environment


def test_a_workspace_has_one_attempt_at_a_time(tmp_path: Path) -> None:
    held = take_lock(tmp_path / "lock", seconds=0)
    started = time.monotonic()
    with pytest.raises(InternalError, match="still holds"):
        take_lock(tmp_path / "lock", seconds=0.5)
    assert 0.5 <= time.monotonic() - started < 2
    threading.Timer(0.3, os.close, [held]).start()
    mine = take_lock(tmp_path / "lock", seconds=5)
    with (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(mine)


def run_attempt(workspace: Path) -> tuple[int, list[FailedLine], list[dict[str, object]]]:
    """Exit code, `failed` lines and log lines of a real attempt in this workspace."""
    names = {JOB_ID: "job_x", ATTEMPT: "3"}
    log = workspace / "attempt.log"
    with ChildProcess(
        ["workers.child.attempt", str(workspace)],
        environment=child_environment(names),
        log_path=log,
        silence_seconds=60,
    ) as child:
        raw = []
        while not child.ended():
            raw += child.lines(0.1)
        raw += child.remaining_lines()
        code = child.finish()
    lines = [ATTEMPT_LINE.validate_json(line) for line in raw]
    logged = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return code, [line for line in lines if isinstance(line, FailedLine)], logged


def test_an_order_that_is_no_order(tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text("{}")
    code, failed, logged = run_attempt(tmp_path)
    assert code == EXIT_FAILED
    assert [line.error.code for line in failed] == ["internal_error"]
    assert [(line["event"], line["job_id"], line["attempt"]) for line in logged] == [("attempt_failed", "job_x", 3)]
    assert "ValidationError" in str(logged[0]["exception"])


def test_a_model_of_pickles_is_the_callers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has torch already; `tests/e2e/test_kills.py` starts real ones."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "output" / "native").mkdir(parents=True)
    (tmp_path / "output" / "native" / "half.safetensors").write_text("of a killed attempt")
    request = JobRequest.parse({"model": str(tmp_path / "model"), "method": "rtn"})
    order = AttemptOrder(job_id="job_x", attempt=3, request=request, model_path=str(tmp_path / "model"), device="cpu")
    with (tmp_path / "lines").open("wb") as lines:
        monkeypatch.setenv(REPORT_FD, str(lines.fileno()))
        with pytest.raises(UnsafeCheckpoint):
            run_order(order, tmp_path, ReportPipe())
    assert not (tmp_path / "output").exists(), "what an earlier attempt wrote is gone"
