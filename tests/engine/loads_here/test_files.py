"""The finished checkpoints, read back in a stage of its own: failures keep the files and warn."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.attempt_lines import AttemptLine
from app.domain.formats import ExportFormat
from app.domain.request.job_request import Requirements
from bitwright.events import ProgressEvent, Stage, WarningEvent
from bitwright.report import LoadReport
from tests.engine.conftest import run_job
from tests.engine.loads_here.faults import FAULTS, Faulty
from workers.engine import export
from workers.supervise.attempt.requirements import missed_requirement


def files_of(loads: tuple[LoadReport, ...]) -> list[tuple[str, str, str, int | None]]:
    return [(load.format, load.runtime, load.result, load.tokens_written) for load in loads if load.read == "files"]


@pytest.mark.slow
def test_every_format_is_loaded_and_writes(small_model: Path, tmp_path: Path, reads: dict[str, Any]) -> None:
    lines: list[AttemptLine] = []
    formats = ["compressed-tensors", "merged", "native"]
    result = run_job(small_model, tmp_path, lines, order=reads, verify="files", formats=formats)
    assert files_of(result.report.loads) == [(name, "transformers", "loads", 16) for name in formats]
    assert all(load.difference is not None and load.difference < 0.01 for load in result.report.loads)
    told = [line for line in lines if isinstance(line, ProgressEvent)]
    checkpoints = [line for line in told if line.stage is Stage.VERIFY and line.unit == "checkpoints"]
    assert (checkpoints[-1].done, checkpoints[-1].total) == (3, 3)
    seconds = result.report.seconds
    assert list(seconds)[-2:] == ["verify", "total"]
    assert seconds["verify"] >= sum(load.seconds for load in result.report.loads if load.read == "files")
    for name in formats:
        stored = json.loads((tmp_path / result.checkpoints[name] / "report.json").read_text())
        assert stored["loads"] == [load.model_dump() for load in result.report.loads]
        card = (tmp_path / result.checkpoints[name] / "README.md").read_text()
        assert card.count("| this checkpoint | loads |") == 1
    written = {load.format: load.written for load in result.report.loads if load.read == "files"}
    merged = written["merged"]
    assert merged is not None
    assert merged.original == greedy(small_model, merged.prompt)
    assert merged.result == greedy(tmp_path / result.checkpoints["merged"], merged.prompt)
    assert written["native"] == merged
    page = (tmp_path / result.checkpoints["merged"] / "report.html").read_text()
    assert 'id="generations"' in page


def greedy(folder: Path, prompt: str) -> str:
    """What a checkpoint writes after a prompt, by transformers' own generation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :]))


def test_an_adapter_is_loaded_beside_its_base(small_model: Path, tmp_path: Path, reads: dict[str, Any]) -> None:
    spec: dict[str, Any] = {
        "method": "loftq",
        "bits": 3,
        "rank": 4,
        "base": "affine",
        "formats": ["compressed-tensors", "peft"],
    }
    report = run_job(small_model, tmp_path, order=reads, verify="files", **spec).report
    assert files_of(report.loads) == [
        ("compressed-tensors", "transformers", "loads", 16),
        ("peft", "peft", "loads", 16),
    ]
    of_block = {load.format: load.result for load in report.loads if load.read == "block"}
    assert of_block == {"compressed-tensors": "loads", "peft": "not_checked"}
    base, both = (load.difference for load in report.loads if load.read == "files")
    assert base is not None
    assert both is not None
    assert max(base, both) < 0.01


def test_without_a_model_files_load_and_are_compared_with_nothing(
    small_model: Path, tmp_path: Path, reads: dict[str, Any]
) -> None:
    report = run_job(small_model, tmp_path, order=reads, verify="files", weights_only=True).report
    assert files_of(report.loads) == [("compressed-tensors", "transformers", "loads", 16)]
    assert report.loads[0].difference is None
    assert report.seconds["verify"] > 0
    unread = run_job(small_model, tmp_path / "block", order=reads, weights_only=True).report
    assert [load.result for load in unread.loads] == ["not_checked"]


@pytest.mark.parametrize("fault", ["scales of rows swapped", pytest.param("no tokenizer", marks=pytest.mark.slow)])
def test_a_failure_keeps_the_files_and_warns_and_misses_what_is_required(
    small_model: Path, tmp_path: Path, reads: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = vars(export)["open_writers"]

    def opened(folder: Path, *given: Any, **named: Any) -> dict[ExportFormat, Any]:
        writers = dict(real(folder, *given, **named))
        name = ExportFormat.COMPRESSED_TENSORS
        return writers | {name: Faulty(writers[name], folder / name.value, FAULTS[fault])}

    monkeypatch.setattr(export, "open_writers", opened)
    lines: list[AttemptLine] = []
    result = run_job(small_model, tmp_path, lines, order=reads, verify="files")
    loads = {load.read: load for load in result.report.loads}
    outcome = "does_not_load" if fault == "no tokenizer" else "differs"
    assert (loads["block"].result, loads["files"].result) == ("loads", outcome)
    (warning,) = [line for line in lines if isinstance(line, WarningEvent) and line.code.startswith("runtime_")]
    assert warning.code == f"runtime_{outcome}"
    assert warning.message in result.report.warnings
    assert (tmp_path / result.checkpoints["compressed-tensors"] / "README.md").is_file()
    missed = missed_requirement(Requirements(loads=("transformers",)), result.report)
    assert missed is not None
    assert (missed.field, missed.value) == ("require.loads", "transformers")
