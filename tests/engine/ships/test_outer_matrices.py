"""Quantized embeddings and heads, tied and apart: each checkpoint, loaded by its stock loader, has the perplexity that
its report states, and its files the sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import ResultLine
from app.domain.formats import ExportFormat
from app.domain.request.job_request import JobRequest
from bitwright.errors import FormatCannotHold, InvalidRequest
from tests.engine.conftest import run_job
from tests.engine.model.loading import loader
from tests.engine.ships import shipping

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
ROWS = [{"text": f"the {a} of the {b} is a {c}"} for a in shipping.WORDS for b in shipping.WORDS for c in ("scale",)]


@pytest.fixture(scope="module")
def tied_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its head's matrix for its embeddings, too."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.config.tie_word_embeddings = True
    model.model.embed_tokens.weight.data.add_(model.lm_head.weight.data).div_(2)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    for file in small_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_told_truly(result: ResultLine, workspace: Path, ids: torch.Tensor) -> None:
    """Perplexities by the loaded models' own forward passes, and the bytes on disk."""
    for way, checkpoint, found in shipping.measured(result, workspace / "output", ids):
        assert way.figures.perplexity == pytest.approx(found, rel=0.005), (way, checkpoint)
    for name, size in result.report.size.bytes_files.items():
        files = (workspace / "output" / name).glob(ExportFormat(name).info.weight_files[0])
        assert size == sum(file.stat().st_size for file in files)
    assert set(result.report.size.bytes_files) == set(result.checkpoints) - {"adapter"}


def sequences(model: Path, result: ResultLine, rows: Path) -> torch.Tensor:
    body = {
        "model": str(model),
        "method": "rtn",
        "evaluation": {"dataset": str(rows), "num_samples": 4, "sequence_length": 48},
    }
    return shipping.sequences(JobRequest.parse(body), model, rows)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def ran(model: Path, rows: Path, workspace: Path, modules: Any, **request: Any) -> ResultLine:
    evaluation = {"dataset": str(rows), "num_samples": 4, "sequence_length": 48}
    order = {"evaluation_path": str(rows)}
    return run_job(model, workspace, order=order, modules=modules, evaluation=evaluation, **request)


CASES: dict[str, dict[str, Any]] = {
    "embeddings alone": {"modules": {"embeddings": 2}, "formats": ["native", "merged", "gguf"]},
    "mlx": {"modules": {"embeddings": 3, "head": 3}, "formats": ["mlx", "merged"], "symmetric": False},
    "mlx, a head alone": {"modules": {"head": 2}, "formats": ["mlx"]},
    "both apart": {"modules": {"embeddings": 4, "head": 4}, "formats": ["merged", "gguf"]},
    "uniform": {"modules": {"embeddings": 4, "head": 4}, "formats": ["compressed-tensors", "merged"]},
    "uniform with zero points": {
        "modules": {"embeddings": 4, "head": 4},
        "formats": ["compressed-tensors", "merged"],
        "symmetric": False,
    },
    "rounded offsets": {"modules": {"embeddings": 4, "head": 4}, "formats": ["gguf", "merged"], "symmetric": False},
    "head alone": {"modules": {"head": 2}, "formats": ["compressed-tensors", "merged"]},
    "head alone for llama.cpp": {"modules": {"head": 2}, "formats": ["gguf", "merged"]},
    "a number format": {"modules": {"embeddings": "nvfp4a16"}, "formats": ["merged"]},
    "another method": {"modules": {"embeddings": 3}, "formats": ["merged"], "method": "signround", "steps": 2},
}


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_the_report_speaks_of_what_is_loaded(
    case: str, tied: bool, small_model: Path, tied_model: Path, rows: Path, tmp_path: Path
) -> None:
    model = tied_model if tied else small_model
    result = ran(model, rows, tmp_path, **CASES[case])
    assert_told_truly(result, tmp_path, sequences(model, result, rows))


def test_a_tied_matrix_is_quantized_once_and_used_twice(tied_model: Path, rows: Path, tmp_path: Path) -> None:
    formats = ["native", "compressed-tensors", "merged"]
    result = ran(tied_model, rows, tmp_path, {"embeddings": 4}, formats=formats)
    report, output = result.report, tmp_path / "output"
    assert report.embeddings is not None
    assert (report.embeddings.name, report.embeddings.bits, report.head) == ("model.embed_tokens", 4, None)
    weights = loader(output / "native").load_weights(output / "native")
    assert "lm_head.weight" not in weights
    model = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    packed = AutoModelForCausalLM.from_pretrained(output / "compressed-tensors")
    assert not packed.config.tie_word_embeddings
    for matrix in (packed.lm_head.weight, packed.model.embed_tokens.weight):
        assert torch.equal(matrix, model.lm_head.weight)


def test_a_head_alone_leaves_tied_embeddings_as_they_are(tied_model: Path, rows: Path, tmp_path: Path) -> None:
    result = ran(tied_model, rows, tmp_path, {"head": 4}, formats=["native", "compressed-tensors"])
    original = AutoModelForCausalLM.from_pretrained(tied_model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "compressed-tensors")
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    weights = loader(tmp_path / "output" / "native").load_weights(tmp_path / "output" / "native")
    assert not torch.equal(weights["lm_head.weight"], original.lm_head.weight)
    size = result.report.size
    assert size.bytes_original == sum(p.numel() * 2 for p in original.parameters())
    assert result.report.model.parameters == sum(p.numel() for p in original.parameters())
    assert size.bytes_quantized < size.bytes_files["native"]


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_stopped_job_goes_on_from_its_embeddings(
    tied: bool, small_model: Path, tied_model: Path, rows: Path, tmp_path: Path
) -> None:
    model = tied_model if tied else small_model
    modules = {"embeddings": 4, "head": 4}
    first = ran(model, rows, tmp_path, modules, formats=["native"], method="gptq")
    state = tmp_path / "state" / "embeddings.safetensors"
    kept = state.stat().st_mtime_ns
    again = ran(model, rows, tmp_path, modules, formats=["native"], method="gptq")
    assert state.stat().st_mtime_ns == kept
    assert again.report.blocks_resumed == len(again.report.blocks)
    assert again.report.quality == first.report.quality
    assert again.report.embeddings == first.report.embeddings


def test_two_schemes_for_one_matrix_are_refused(tied_model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ran(tied_model, rows, tmp_path, {"embeddings": 4, "head": 8}, formats=["native"])
    assert caught.value.field == "quantization.modules.head"


def test_a_head_that_stays_is_refused_where_it_does_not_load(small_model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatCannotHold, match='ask for formats: \\["native"\\]'):
        ran(small_model, rows, tmp_path, {"embeddings": 4}, formats=["compressed-tensors"])


@pytest.mark.parametrize("modules", [{"embeddings": 4}, {"head": 4}, {"embeddings": 4, "head": 4}], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_without_a_model_the_same_files_are_made(
    tied: bool, modules: dict[str, int], small_model: Path, tied_model: Path, tmp_path: Path
) -> None:
    """Of a model's class and of tensors by their names, the codes, scales and configuration are the same."""
    model = tied_model if tied else small_model
    formats = ["merged", *(["compressed-tensors"] if tied or "head" in modules else [])]
    body: dict[str, Any] = {"modules": modules, "formats": formats, "evaluation": None}
    by_class = run_job(model, tmp_path / "class", **body).report
    by_name = run_job(model, tmp_path / "names", weights_only=True, **body).report
    for name in ("native", *formats):
        one, other = (tmp_path / way / "output" / name for way in ("class", "names"))
        stem = "weights" if name == "native" else "model"
        assert equal(load_file(one / f"{stem}.safetensors"), load_file(other / f"{stem}.safetensors"))
        configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
        assert configs[0] == configs[1]
    assert by_name.embeddings == by_class.embeddings
    assert by_name.head == by_class.head
    assert by_name.size == by_class.size
    assert by_name.model.parameters == by_class.model.parameters


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_adapters_are_trained_on_quantized_embeddings(
    tied: bool, small_model: Path, tied_model: Path, rows: Path, tmp_path: Path
) -> None:
    """And a job that goes on from the result takes its matrices as they are."""
    model, modules = tied_model if tied else small_model, {"embeddings": 2, "head": 2}
    finetune = {"dataset": str(rows), "steps": 2, "batch_size": 2, "sequence_length": 48}
    evaluation = {"dataset": str(rows), "num_samples": 4, "sequence_length": 48}
    paths = {"evaluation_path": str(rows), "finetuning_path": str(rows)}
    body: dict[str, Any] = {"modules": modules, "adapter": {"kind": "lora", "rank": 2}, "finetune": finetune}
    body |= {"evaluation": evaluation, "formats": ["merged", "peft"]}
    first = run_job(model, tmp_path / "first", order=paths, **body)
    ids = shipping.sequences(JobRequest.parse({"model": str(model), "method": "rtn", **finetuned(body)}), model, rows)
    assert_told_truly(first, tmp_path / "first", ids)
    base = {"base_job_path": str(tmp_path / "first" / "output")}
    again = run_job(model, tmp_path / "again", order=paths | base, base_job="job_" + "0" * 25, **body)
    stored = [load_file(tmp_path / job / "output" / "native" / "weights.safetensors") for job in ("first", "again")]
    outer = [name for name in stored[0] if "embed_tokens" in name or "lm_head" in name]
    assert outer
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in outer)
    assert again.report.embeddings == first.report.embeddings


def finetuned(body: dict[str, Any]) -> dict[str, Any]:
    """The fields that decide the evaluation text."""
    return {name: body[name] for name in ("finetune", "evaluation")}
