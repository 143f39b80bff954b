"""A model with a tokenizer that is trained for seconds, and a way to run the pipeline on it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine, ResultLine
from app.domain.request.job_request import JobRequest
from bitwright.report import Report
from workers.disk.orders import AttemptOrder
from workers.engine.evaluate import measure
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.tiny_model import Recipe, make_tiny_model

TEXTS = {
    "calibration": {"num_samples": 8, "sequence_length": 32},
    "evaluation": {"num_samples": 4, "sequence_length": 48},
}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llama blocks of width 64, bf16, with a tokenizer; barely trained."""
    recipe = Recipe(vocabulary=400, width=64, intermediate=192, blocks=3, positions=256, steps=30, batch=4, length=64)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "small", recipe)


def run_job(
    model: Path, workspace: Path, lines: list[AttemptLine] | None = None, order: Any = None, **request: Any
) -> ResultLine:
    """Runs the pipeline over small texts; `request` is the body, fields of `quantization` at its top, or it whole."""
    plain = {"method": "rtn", **({} if "scheme" in request else {"group_size": 32})}
    quantization = request.pop("quantization", plain)
    quantization |= {name: request.pop(name) for name in list(request) if name not in JobRequest.model_fields}
    if not quantization.keys() & {"at_most", "fits", "scheme"}:
        quantization = {"bits": 4, **quantization}
    body = {"model": str(model), "quantization": quantization, **TEXTS, **request}
    workspace.mkdir(parents=True, exist_ok=True)
    sink = [] if lines is None else lines
    given = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse(json.loads(json.dumps(body))),
        model_path=str(model),
        **({"device": "cpu"} | (order or {})),
    )
    return run(given, workspace, Reporter(sink.append, given.traceparent))


@dataclass(frozen=True)
class Finished:
    """A job that has run: its workspace, its result, what it told. Tests that go on from it copy the workspace."""

    workspace: Path
    result: ResultLine
    lines: list[AttemptLine]

    @property
    def report(self) -> Report:
        return self.result.report


def finish(model: Path, workspace: Path, **request: Any) -> Finished:
    """Runs a job as `run_job` does, and keeps all that came of it."""
    lines: list[AttemptLine] = []
    return Finished(workspace, run_job(model, workspace, lines, **request), lines)


@pytest.fixture(scope="session")
def single_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in fp32, where every rounding that differs would show."""
    folder = tmp_path_factory.mktemp("single")
    AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).save_pretrained(folder)
    for file in small_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def engine_logits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Evaluation sequences and the logits of the quantized activations, as the engine has them when it measures."""
    found: list[tuple[Tensor, Tensor]] = []

    def watch(model: Any, original: Tensor, quantized: Tensor, sequences: Any, **rest: Any) -> Any:
        with model.loaded(*model.after_blocks):
            found.append((sequences.ids, model.logits(quantized)))
        return measure(model, original, quantized, sequences, **rest)

    monkeypatch.setattr("workers.engine.evaluate.measure", watch)
    return found


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes JSONL files."""

    def write(name: str, rows: list[Any]) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write
