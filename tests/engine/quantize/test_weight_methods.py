"""GPTQ, AWQ and OmniQuant through the whole engine: closer than rounding, resumable, and written as they were made."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.domain.methods import AWQSpec
from app.domain.request.job_request import Evaluation
from tests.engine.conftest import run_job
from workers.contracts.results import BlockResult
from workers.engine.quantize.registry import METHODS
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

SPECS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq", "search_samples": 4},
    "omniquant": {"method": "omniquant", "epochs": 5, "batch_size": 2, "learning_rate": 0.03},
}
SIZE: dict[str, Any] = {
    "calibration": {"num_samples": 32, "sequence_length": 64},
    "evaluation": {"num_samples": 16, "sequence_length": 64},
}


def stored(workspace: Path) -> dict[str, torch.Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model in bf16 and in fp32."""
    folder = tmp_path_factory.mktemp("fp32")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return {"bfloat16": tiny_model, "float32": folder}


@pytest.fixture(scope="module")
def rounded(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """KL of round to nearest at 3 bits, by the model's dtype."""
    found = {}
    for dtype, model in models.items():
        report = run_job(model, tmp_path_factory.mktemp("rtn"), bits=3, group_size=64, symmetric=False, **SIZE).report
        assert report.plan["dtype"] == dtype
        assert report.quality is not None
        found[dtype] = report.quality.kl_divergence
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", SPECS)
def test_it_is_closer_than_rounding_on_a_trained_model(
    method: str, dtype: str, models: dict[str, Path], rounded: dict[str, float], tmp_path: Path
) -> None:
    job = {"bits": 3, "group_size": 64, "symmetric": False, **SPECS[method], **SIZE}
    report = run_job(models[dtype], tmp_path, **job).report
    assert report.quality is not None
    assert report.quality.kl_divergence < 0.9 * rounded[dtype]
    for block in report.blocks:
        assert block.counters
        assert all(0.01 < linear.weight_error < 0.6 for linear in block.linears)


@pytest.mark.parametrize("method", SPECS)
def test_a_resumed_job_has_the_codes_of_an_undisturbed_one(
    method: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"bits": 3, **SPECS[method]}
    whole = run_job(small_model, tmp_path / "whole", **job).report
    restore = interrupt(monkeypatch, method, block=2)
    with pytest.raises(KeyboardInterrupt):
        run_job(small_model, tmp_path / "cut", **job)
    restore()
    resumed = run_job(small_model, tmp_path / "cut", **job).report
    assert (resumed.blocks_computed, resumed.blocks_resumed) == (1, 2)
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.quality == whole.quality
    assert [b.counters for b in resumed.blocks] == [b.counters for b in whole.blocks]


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, block: int) -> Callable[[], None]:
    """The method stops when it comes to `block`, until the result is called."""
    code = METHODS[method]
    original = code.quantize_block

    def quantize(task: Any, spec: Any) -> BlockResult:
        if task.index == block:
            raise KeyboardInterrupt
        return original(task, spec)

    monkeypatch.setattr(code, "quantize_block", quantize)
    return lambda: monkeypatch.setattr(code, "quantize_block", original)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", SPECS)
def test_what_is_reported_is_what_the_written_checkpoint_does(
    method: str, symmetric: bool, small_model: Path, tmp_path: Path
) -> None:
    result = run_job(small_model, tmp_path, bits=3, symmetric=symmetric, **SPECS[method])
    quality = result.report.quality
    assert quality is not None
    part = Evaluation(num_samples=4, sequence_length=48)
    ids = evaluation_sequences(load_tokenizer(small_model), part, None, 0, None).ids
    folder = tmp_path / result.checkpoints["compressed-tensors"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=2e-3)


def test_norms_that_awq_changed_are_written_in_place_of_the_sources_and_all_else_is_copied(
    small_model: Path, tmp_path: Path
) -> None:
    result = run_job(small_model, tmp_path, bits=3, **SPECS["awq"])
    source = load_file(small_model / "model.safetensors")
    norms = {n for n in source if n.endswith(("input_layernorm.weight", "post_attention_layernorm.weight"))}
    for folder, stem in (("native", "weights"), ("compressed-tensors", "model")):
        written = load_file(tmp_path / "output" / folder / f"{stem}.safetensors")
        assert written.keys() >= norms | {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
        changed = {name for name in source.keys() & written.keys() if not torch.equal(source[name], written[name])}
        assert changed
        assert changed <= norms, "and some of them are best left alone"
        assert all(written[name].dtype == source[name].dtype for name in norms)
    assert result.report.size.bytes_original == sum(tensor.nbytes for tensor in source.values())
    folded = [block.counters["scales_moved"] for block in result.report.blocks]
    assert folded == [3, 3, 3], "v has fewer outputs than o has inputs"


def test_scales_are_tuned_behind_the_norms_that_awq_changed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage starts from the model that the blocks left and ends with it: not with one with the source's norms."""
    job: dict[str, Any] = {"bits": 3, **SPECS["awq"]}
    plain = run_job(small_model, tmp_path / "plain", **job).report
    monkeypatch.setattr(AWQSpec, "end_to_end_steps", lambda _: 12)
    tuned, resumed = (run_job(small_model, tmp_path / "tuned", **job).report for _ in range(2))
    assert resumed.blocks_resumed == 3
    assert tuned.scales is not None
    assert tuned.scales.kept, "the evaluation goes through the blocks again"
    assert tuned.quality is not None
    assert plain.quality is not None
    assert tuned.scales.kl_initial < 3 * plain.quality.kl_divergence
    assert tuned.quality.kl_divergence < 1.1 * plain.quality.kl_divergence
    assert resumed.quality == tuned.quality
