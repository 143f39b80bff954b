"""Tasks in whole jobs: what ships is asked, chats are judged, and rows that cannot be asked are refused by line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidDataset, InvalidRequest
from tests.engine.conftest import run_job
from tests.engine.tasks.test_lm_eval import GOLDEN, task_of
from workers.disk.orders import AttemptOrder
from workers.engine.job_texts import read_files
from workers.engine.text.sequences import load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}]
TALK = [{"role": "user", "content": "What does the with statement do?"}]


def asking(file: Path, kind: str, **fields: Any) -> dict[str, Any]:
    """Fields of a job that asks a file's rows."""
    task = {"name": "rows", "kind": kind, "dataset": str(file), **fields}
    evaluation = {"num_samples": 4, "sequence_length": 48, "tasks": [task]}
    return {"evaluation": evaluation, "order": {"other_texts": {"evaluation.tasks.0.dataset": str(file)}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "job",
    [
        {"bits": 8},
        {"bits": 4, "scheme": None, "modules": {"embeddings": 8}},
        {"scheme": "nvfp4", "formats": ["compressed-tensors"]},
        {"bits": 4, "method": "loftq", "rank": 4, "formats": ["merged", "peft"]},
    ],
)
def test_what_ships_is_near_the_original(job: dict[str, Any], tmp_path: Path) -> None:
    """Whatever ways numbers are stored and loaded: rounded embeddings, rounded inputs, factors beside a base."""
    job = {name: value for name, value in job.items() if value is not None}
    report = run_job(GOLDEN, tmp_path, **job, verify="off", **asking(GOLDEN / "texts.jsonl", "perplexity")).report
    (task,) = report.tasks
    figure = task.figure("bits_per_byte")
    assert figure is not None
    assert figure.original is not None
    assert figure.original == pytest.approx(3.57485400, rel=1e-6)  # lm-eval's, as in tests/golden
    assert 0 < abs(figure.value - figure.original) < 0.2
    assert report.quality is not None
    assert (figure.value > figure.original) == (report.quality.perplexity > report.quality.perplexity_original)


@pytest.mark.slow
def test_a_chat_is_judged_by_its_end_and_its_calls(
    small_model: Path, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    answered = [*TALK, {"role": "assistant", "content": "It wraps a block."}]
    file = write_lines("chat.jsonl", [{"messages": TALK}, {"messages": answered}] * 3)
    report = run_job(small_model, tmp_path, **asking(file, "chat", max_new_tokens=24)).report
    (task,) = report.tasks
    found = {figure.name: figure for figure in task.figures}
    assert set(found) == {"well_formed", "ended", "same_tokens"}  # no row has tools
    assert 0 <= found["same_tokens"].value <= 24
    assert task.tokens_written <= 6 * 24
    assert task.rows == 6


def read(model: Path, file: Path, kind: str, **fields: Any) -> None:
    given = asking(file, kind, **fields)
    order = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse({"model": "org/m", "method": "rtn", "evaluation": given["evaluation"]}),
        model_path=str(model),
        device="cpu",
        other_texts=given["order"]["other_texts"],
    )
    read_files(order, load_tokenizer(model))


GOOD = {"question": "a b", "choices": ["c", "d"], "answer": 1}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("multiple_choice", {"question": "a", "choices": ["b"], "answer": 0}, "line 2: choices is a list of 1"),
        ("multiple_choice", {**GOOD, "answer": 2}, "line 2: answer is 2"),
        ("multiple_choice", {**GOOD, "answer": "e"}, 'line 2: answer is "e"'),
        ("multiple_choice", {"choices": ["b", "c"], "answer": 0}, "line 2: question is missing"),
        ("chat", {"messages": TALK}, "line 1: .* no chat template"),
        ("chat", {"text": "a"}, "line 1: a row of a chat has no messages"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_by_its_line(
    kind: str, row: dict[str, Any], words: str, write_lines: Callable[..., Path]
) -> None:
    rows = [GOOD, row] if kind == "multiple_choice" else [row]
    with pytest.raises(InvalidDataset, match=words) as refused:
        read(GOLDEN, write_lines("rows.jsonl", rows), kind)
    assert refused.value.field == "evaluation.tasks.0.dataset"


@pytest.mark.slow
def test_a_row_that_is_too_long_is_named_by_its_line(tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    file = write_lines("rows.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "word " * 200, "answer": "b"}])
    with pytest.raises(InvalidDataset, match=r"line 2: it takes .* positions"):
        run_job(GOLDEN, tmp_path, **asking(file, "exact_match"))


@pytest.mark.parametrize(
    ("limit", "field", "words"),
    [
        ({"task": "other", "metric": "acc", "at_least": 0.5}, "require.tasks.0.task", "it has: choices"),
        ({"task": "choices", "metric": "f1", "at_least": 0.5}, "require.tasks.0.metric", "acc, acc_norm"),
        ({"task": "choices", "metric": "acc"}, "require.tasks.0", "say a limit"),
    ],
)
def test_a_limit_on_what_nothing_measures_is_refused(limit: dict[str, Any], field: str, words: str) -> None:
    body = {"model": "org/m", "method": "rtn", "evaluation": {"tasks": [task_of("choices")]}}
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse({**body, "require": {"tasks": [limit]}})
    (problem,) = refused.value.errors
    assert problem.field == field
    assert words in problem.detail
