"""Jobs from quantized sources: the results of jobs from the dequantized checkpoint, and a word about the source."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from app.domain.attempt_lines import AttemptLine
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from bitwright.events import WarningEvent
from tests.engine.conftest import run_job
from tests.engine.model.sources.encoders import KINDS, quantized_folder
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.text.sequences import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def dequantized(folder: Path, target: Path) -> Path:
    """The ordinary checkpoint of a quantized one."""
    checkpoint = Checkpoint.open(folder)
    shutil.copytree(checkpoint.folder, target)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _inspected(folder: Path) -> tuple[int, int, object]:
    """What a dry run says of an ordinary checkpoint."""
    found = inspect_checkpoint(FolderFiles(folder))
    assert found.quantized is None
    return found.tensor_bytes, found.weights, found.config


def demand_same(one: Path, other: Path) -> None:
    """Holds that two results have the same weights, configuration and tokenizer, byte for byte."""
    left, right = one / "output" / "merged", other / "output" / "merged"
    tensors, wanted = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert (left / "config.json").read_bytes() == (right / "config.json").read_bytes()
    assert (left / "tokenizer.json").read_bytes() == (right / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_from_a_quantized_source_is_the_job_from_its_numbers(
    kind: str, small_model: Path, tmp_path: Path
) -> None:
    source = quantized_folder(small_model, tmp_path / "source", kind)
    plain = dequantized(source, tmp_path / "plain")
    original = load_file(small_model / "model.safetensors")
    for name, tensor in load_file(plain / "model.safetensors").items():
        error = (tensor.float() - original[name].float()).norm() / original[name].float().norm()
        assert error < 0.2, f"{name} is another weight"
    found, checkpoint = inspect_checkpoint(FolderFiles(source)), Checkpoint.open(source)
    assert (found.tensor_bytes, found.weights) == (checkpoint.size, checkpoint.size // 2), "all of it is bf16"
    assert (found.tensor_bytes, found.weights, found.config) == _inspected(plain)
    lines = list[AttemptLine]()
    result = run_job(source, tmp_path / "one", lines, formats=["merged"])
    other = run_job(plain, tmp_path / "other", formats=["merged"])
    demand_same(tmp_path / "one", tmp_path / "other")
    assert result.report.quality == other.report.quality
    (warning,) = [line for line in lines if isinstance(line, WarningEvent) and line.code == "quantized_source"]
    said = result.report.model.quantized_source
    assert said is not None
    assert said == found.quantized
    assert said in warning.message
    assert warning.message in result.report.warnings
    assert other.report.model.quantized_source is None
    assert "quantization_config" not in json.loads((tmp_path / "one" / "output" / "merged" / "config.json").read_text())


def test_a_job_from_a_gguf_file_is_the_job_from_the_model_that_transformers_loads(
    small_model: Path, tmp_path: Path
) -> None:
    run_job(small_model, tmp_path / "first", formats=["gguf"], bits=8)
    folder = tmp_path / "first" / "output" / "gguf"
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(folder / "model.gguf", source / "tiny.Q8_0.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="tiny.Q8_0.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="tiny.Q8_0.gguf")
    checkpoint = Checkpoint.open(source)
    state = model.state_dict()
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), state[name]), name
    text = "It was a bright cold day in April, and the clocks were striking 13."
    assert load_tokenizer(checkpoint.folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == load_tokenizer(small_model)(text)["input_ids"]

    plain = dequantized(source, tmp_path / "plain")
    found = inspect_checkpoint(FolderFiles(source))
    assert (found.tensor_bytes, found.weights, found.config) == _inspected(plain)
    result = run_job(source, tmp_path / "one", formats=["merged", "gguf"])
    run_job(plain, tmp_path / "other", formats=["merged", "gguf"])
    demand_same(tmp_path / "one", tmp_path / "other")
    said = result.report.model.quantized_source
    assert said is not None
    assert said == found.quantized
    assert "GGUF" in said
    assert "Q8_0" in said
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "output" / "merged")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_results_of_this_service_are_sources_too(small_model: Path, tmp_path: Path) -> None:
    run_job(small_model, tmp_path / "first", formats=["compressed-tensors", "merged"])
    output = tmp_path / "first" / "output"
    checkpoint = Checkpoint.open(output / "compressed-tensors")
    merged = load_file(output / "merged" / "model.safetensors")
    assert set(checkpoint.tensors) == set(merged)
    for name, tensor in merged.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_a_quantized_source_may_write_its_own_calibration_text(small_model: Path, tmp_path: Path) -> None:
    source = quantized_folder(small_model, tmp_path / "source", "gptq")
    plain = dequantized(source, tmp_path / "plain")
    calibration = {"num_samples": 4, "sequence_length": 16, "dataset": "generated"}
    one = run_job(source, tmp_path / "one", formats=["merged"], method="gptq", calibration=calibration)
    other = run_job(plain, tmp_path / "other", formats=["merged"], method="gptq", calibration=calibration)
    assert one.report.calibration == other.report.calibration
    demand_same(tmp_path / "one", tmp_path / "other")
