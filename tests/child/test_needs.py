"""Memory that an attempt says its job needs: what a dry run says, or nothing where the model cannot be judged."""

import json
import os
from pathlib import Path

import pytest

from app.domain.estimates import estimate
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from app.domain.request.job_request import JobRequest
from tests.api.checkpoints import write_checkpoint
from workers.child.lifeline import REPORT_FD, ReportPipe
from workers.child.needs import tell_needs
from workers.disk.orders import AttemptOrder


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file into which the attempt's lines go."""
    lines = tmp_path / "lines"
    descriptor = os.open(lines, os.O_CREAT | os.O_WRONLY)
    monkeypatch.setenv(REPORT_FD, str(descriptor))
    return lines


def order(folder: str) -> AttemptOrder:
    request = JobRequest.parse({"model": "/m", "method": "signround", "bits": 4})
    return AttemptOrder(job_id="job_7", attempt=1, request=request, model_path=folder, device="cpu")


def test_it_is_what_a_dry_run_says(tmp_path: Path, told: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    tell_needs(order(str(folder)), ReportPipe())
    (line,) = map(json.loads, told.read_text().splitlines())
    expected = estimate(order("").request, inspect_checkpoint(FolderFiles(folder)))
    assert line["event"] == "memory_needed"
    assert line["fields"] == {name: expected[name] for name in ("host_memory_bytes", "device_memory_bytes")}
    assert line["fields"]["host_memory_bytes"] > 1 << 30


@pytest.mark.parametrize("config", [None, "no json", '{"model_type": "of another world"}'])
def test_nothing_is_said_of_a_model_that_cannot_be_judged(tmp_path: Path, told: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for folder in (str(tmp_path), str(tmp_path / "missing"), ""):
        tell_needs(order(folder), ReportPipe())
    assert told.read_text() == ""
