"""Jobs of 2 bits whose codes moved end to end: each file, by its stock loader, has the perplexity of the report."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain.attempt_lines import ResultLine
from app.domain.request.job_request import JobRequest
from tests.engine.ships import shipping
from tests.engine.ships.llama_cpp import Answer, ask

LLAMA_CPP = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
TOLERANCE = 0.005

pytestmark = pytest.mark.slow


def best(model: Path, rows: Path, workspace: Path, formats: list[str], **scheme: Any) -> tuple[ResultLine, JobRequest]:
    """A job by `best` with few and short sequences; its codes have moved."""
    request = JobRequest.parse(
        {
            "model": str(model),
            "quantization": {"method": "signround", "preset": "best", "scale_steps": 120, **scheme},
            "calibration": {"num_samples": 12, "sequence_length": 64, "further_samples": 12},
            "evaluation": {"dataset": str(rows), "num_samples": 8, "sequence_length": 64},
            "formats": formats,
        }
    )
    result = shipping.run_case(request, model, rows, workspace)
    scales = result.report.scales
    assert scales is not None
    assert scales.kept
    assert (scales.codes or 0) > 0
    assert scales.norms > 0
    return result, request


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipping.write_rows(tmp_path_factory.mktemp("rows"))


def test_stock_loaders_read_what_was_measured(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    formats = ["native", "compressed-tensors", "merged"]
    result, request = best(tiny_model, rows, tmp_path, formats, bits=2, group_size=64, symmetric=True)
    found = list(shipping.measured(result, tmp_path / "output", shipping.sequences(request, tiny_model, rows)))
    assert {checkpoint for _, checkpoint, _ in found} == set(formats)
    for way, checkpoint, perplexity in found:
        assert way.figures.perplexity == pytest.approx(perplexity, rel=TOLERANCE), checkpoint


@pytest.mark.skipif(not LLAMA_CPP, reason="make test-llama-cpp installs llama.cpp")
def test_llama_cpp_reads_what_was_measured(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    result, request = best(tiny_model, rows, tmp_path, ["gguf"], scheme="q2_0")
    assert {linear.scheme for block in result.report.blocks for linear in block.linears} == {"q2_0"}
    file, losses = tmp_path / result.checkpoints["gguf"] / "model.gguf", []
    for ids in shipping.sequences(request, tiny_model, rows):
        answer = ask(Path(LLAMA_CPP), file, ids.tolist(), [])
        assert isinstance(answer, Answer), answer
        losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(answer.logits)[:-1], ids[1:]))
    assert result.report.quality is not None
    found = math.exp(float(torch.stack(losses).mean()))
    assert result.report.quality.perplexity == pytest.approx(found, rel=TOLERANCE)
