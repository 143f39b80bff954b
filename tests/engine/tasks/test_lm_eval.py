"""Tasks against lm-eval on the same rows: fp32, on the CPU, one row at a time, equal to 1e-6.

tests/golden/lm_eval has a tiny trained model, rows, and the numbers of lm-eval 0.4.13, made by
`tests.engine.tasks.made_golden`.
BITWRIGHT_TEST_LM_EVAL names the Python of an environment with lm-eval, which is then run itself (`make test-lm-eval`).
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain.request.evaluation_tasks import EvaluationTask
from bitwright.measured.tasks import TaskReport
from tests.engine.conftest import run_job
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.tasks.asking import Asked
from workers.engine.tasks.reading import read_task
from workers.engine.tasks.scoring import figures, scored
from workers.engine.tasks.stage import _parts
from workers.engine.text.sequences import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "lm_eval"
KINDS = {"choices": "multiple_choice", "answers": "exact_match", "texts": "perplexity"}
FIGURES = {
    "choices": ("acc", "acc_norm", "acc_bytes"),
    "answers": ("exact_match",),
    "texts": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
LM_EVAL = os.environ.get("BITWRIGHT_TEST_LM_EVAL")


def task_of(name: str) -> dict[str, Any]:
    return {"name": name, "kind": KINDS[name], "dataset": str(GOLDEN / f"{name}.jsonl"), "max_new_tokens": 16}


def numbers(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    """The golden model, whole."""
    model = StreamedModel.open(Checkpoint.open(GOLDEN), torch.device("cpu"), fused=False)
    with model.loaded(*_parts(model)):
        yield Asked(model.model, load_tokenizer(GOLDEN), model.device, model.positions)


@pytest.mark.parametrize("name", KINDS)
def test_each_row_is_what_lm_eval_makes_of_it(name: str, asked: Asked) -> None:
    golden = numbers(GOLDEN / "numbers.json")
    task = EvaluationTask.model_validate({**task_of(name), "dataset": {"source": "local", "path": "rows"}})
    rows = read_task(asked.tokenizer, task, GOLDEN / f"{name}.jsonl", 0)
    told = golden["rows"][f"rows_{name}"]
    assert len(rows.rows) == len(told)
    for row, expected in zip(rows.rows, told, strict=True):
        if name == "choices":
            likely = [asked.log_likelihood(each.context, each.tokens) for each in row.choices]
            assert likely == pytest.approx([float(each[0]) for each in expected], abs=1e-5, rel=1e-6)
        elif name == "answers":
            assert asked.words(asked.greedy(row, rows, 16), rows).strip() == expected[0]
        else:
            assert rows.first is not None
            assert asked.text_log_likelihood(row, rows.first) == pytest.approx(float(expected[0]), rel=1e-6)
    scores = scored(asked, task, rows, lambda: None)
    made = {figure.name: figure for figure in figures(task, rows, scores, scores)}
    for figure in FIGURES[name]:
        value = golden["results"][f"rows_{name}"][f"{figure},{'plain' if name == 'answers' else 'none'}"]
        assert made[figure].original == pytest.approx(value, rel=1e-6)
        assert made[figure].difference_stderr == 0
    if name == "choices":
        stderr = golden["results"]["rows_choices"]["acc_stderr,none"]
        assert made["acc"].stderr == pytest.approx(float(stderr), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="BITWRIGHT_TEST_LM_EVAL names no Python with lm-eval")
def test_what_a_job_reports_lm_eval_measures_of_its_checkpoint(tmp_path: Path) -> None:
    others = {f"evaluation.tasks.{n}.dataset": str(GOLDEN / f"{name}.jsonl") for n, name in enumerate(KINDS)}
    evaluation = {"num_samples": 4, "sequence_length": 48, "tasks": [task_of(name) for name in KINDS]}
    run: dict[str, Any] = {
        "formats": ["merged"],
        "evaluation": evaluation,
        "verify": "off",
        "order": {"other_texts": others},
    }
    done = run_job(GOLDEN, tmp_path / "job", bits=3, **run)
    script = Path(__file__).with_name("lm_eval_numbers.py")
    for model, field in ((GOLDEN, "original"), (tmp_path / "job" / done.checkpoints["merged"], "value")):
        out = tmp_path / f"{field}.json"
        subprocess.run([str(LM_EVAL), "-P", script, model, GOLDEN, out], check=True, capture_output=True)
        told = numbers(out)["results"]
        for report in done.report.tasks:
            _same_as(report, told[f"rows_{report.name}"], field)


def _same_as(report: TaskReport, told: dict[str, Any], field: str) -> None:
    for name in FIGURES[report.name]:
        figure = report.figure(name)
        assert figure is not None
        value = told[f"{name},{'plain' if report.name == 'answers' else 'none'}"]
        assert getattr(figure, field) == pytest.approx(value, rel=1e-6)
