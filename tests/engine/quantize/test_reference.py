"""The reference row of a report against a job of round to nearest; the head's row against its own tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.domain.attempt_lines import AttemptLine
from app.domain.inputs.architectures import read_dimensions
from app.domain.methods import METHODS
from app.domain.request.job_request import JobRequest
from app.domain.workload import calibration_tokens, has_reference, readers_of
from bitwright.events import MetricEvent
from tests.engine.conftest import run_job
from workers.engine.model.checkpoint import Checkpoint

CALIBRATION = {"num_samples": 48, "sequence_length": 64}
EVALUATION = {"num_samples": 4, "sequence_length": 48}
PARTS: dict[str, Any] = {"calibration": CALIBRATION, "evaluation": EVALUATION}


def row(model: Path, folder: Path, **request: Any) -> dict[str, float]:
    """The reference row of a job's report, which must have one."""
    report = run_job(model, folder, **PARTS | request).report
    assert report.round_to_nearest is not None
    return report.round_to_nearest.model_dump()


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("gptq", {"bits": 3, "group_size": 32, "symmetric": False}),
        ("awq", {"bits": 4, "group_size": -1, "symmetric": True}),
    ],
)
def test_the_row_is_what_a_job_of_round_to_nearest_tells(
    small_model: Path, tmp_path: Path, method: str, scheme: dict[str, Any]
) -> None:
    """Overrides, ignored linears and a quantized head included."""
    rules = {"ignore": ["*.layers.1.mlp.*"], "overrides": {"*.o_proj": {"bits": 8}}}
    lines: list[AttemptLine] = []
    found = run_job(small_model, tmp_path / "a", lines, method=method, modules=rules, **scheme, **PARTS).report
    plain = run_job(small_model, tmp_path / "b", method="rtn", modules=rules, **scheme, **PARTS).report
    assert found.round_to_nearest is not None
    assert plain.quality is not None
    assert found.quality is not None
    assert plain.round_to_nearest is None, "a job of round to nearest is its own reference"
    told = plain.quality.model_dump(include={"perplexity", "kl_divergence", "top1_agreement"})
    assert found.round_to_nearest.model_dump() == pytest.approx(told, rel=1e-9)
    assert found.quality.perplexity != plain.quality.perplexity
    metrics = {line.name: line.value for line in lines if isinstance(line, MetricEvent)}
    assert metrics["perplexity_round_to_nearest"] == found.round_to_nearest.perplexity
    card = (tmp_path / "a" / "output" / "native" / "README.md").read_text()
    assert "| | original | quantized | round to nearest |" in " ".join(card.split("  ")).replace("|  |", "| |")
    quality = found.quality
    figures = (quality.perplexity_original, quality.perplexity, told["perplexity"])
    assert "| perplexity | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |" in card


def test_codes_do_not_depend_on_the_row(small_model: Path, tmp_path: Path) -> None:
    with_row = run_job(small_model, tmp_path / "a", method="gptq", **PARTS)
    without = run_job(small_model, tmp_path / "b", method="gptq", calibration=CALIBRATION, evaluation=None)
    assert with_row.report.round_to_nearest is not None
    assert without.report.round_to_nearest is None
    weights = [load_file(tmp_path / name / "output/native/weights.safetensors") for name in "ab"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resumed_job_tells_the_same_row(small_model: Path, tmp_path: Path) -> None:
    first = row(small_model, tmp_path, method="gptq")
    again = run_job(small_model, tmp_path, method="gptq", **PARTS).report
    assert again.blocks_resumed == 3
    assert again.round_to_nearest is not None
    assert again.round_to_nearest.model_dump() == first


def test_memory_for_the_row_is_in_the_plan(small_model: Path, tmp_path: Path) -> None:
    plans = [
        run_job(
            small_model, tmp_path / str(n), method="gptq", calibration=CALIBRATION, evaluation={**EVALUATION, **part}
        )
        for n, part in enumerate(({"num_samples": 4}, {"num_samples": 40}))
    ]
    assert [plan.report.round_to_nearest is not None for plan in plans] == [True, False]
    width, item = 64, 2
    calibration = 2 * 48 * 64
    assert plans[0].report.plan["activation_bytes"] == (calibration + 3 * 4 * 48) * width * item
    # Four sequences of the calibration text are measured beside forty of the evaluation's.
    assert plans[1].report.plan["activation_bytes"] == (calibration + 2 * (40 + 4) * 48) * width * item


def test_a_row_that_would_cost_a_tenth_is_left_out(small_model: Path) -> None:
    dimensions = read_dimensions(Checkpoint.open(small_model).config)

    def has(**fields: Any) -> bool:
        return has_reference(JobRequest.parse({"model": "org/m", "method": "gptq", **fields}), dimensions)

    assert has()
    assert not has(evaluation=None)
    assert not has(method="nf")
    assert not has(method="rtn")
    assert not has(calibration={"num_samples": 16, "sequence_length": 1024})
    tuned = {"dataset": "builtin", "steps": 200}
    assert has(method="qlora", finetune=tuned, evaluation={"num_samples": 2, "sequence_length": 64})


SPECS: list[dict[str, Any]] = [
    *({"method": name} for name in METHODS),
    {"method": "lq-lora", "fisher": False},
    {"method": "lq-lora", "fisher": False, "bits": 3},
    {"method": "rtn", "bits": {"average": 3.5}},
]


@pytest.mark.parametrize("fields", SPECS, ids=str)
def test_a_job_whose_method_reads_text_has_a_reader_and_is_charged_for_it(fields: dict[str, Any]) -> None:
    request = JobRequest.parse({"model": "org/m", "evaluation": None, **fields})
    reads = request.quantization.reads_text()
    assert readers_of(request) == (["calibration"] if reads else [])
    assert (calibration_tokens(request) > 0) == reads


def test_a_quantized_head_has_a_row(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    untied = tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(untied)
    for file in small_model.glob("tokenizer*"):
        (untied / file.name).write_bytes(file.read_bytes())
    report = run_job(untied, tmp_path / "job", modules={"ignore": []}, formats=["merged"]).report
    assert report.head is not None
    assert (report.head.name, report.head.bits, report.head.shape) == ("lm_head", 4, (400, 64))
    before = load_file(untied / "model.safetensors")["lm_head.weight"].double()
    after = load_file(tmp_path / "job/output/merged/model.safetensors")["lm_head.weight"].double()
    assert report.head.weight_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert run_job(small_model, tmp_path / "tied").report.head is None
