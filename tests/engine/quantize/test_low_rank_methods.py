"""LoftQ and ApiQ through the real engine: nearer than rounding alone, loaded by stock peft, interrupted and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from app.domain.methods import Form
from bitwright.report import Report
from tests.engine.conftest import run_job
from tests.engine.model.loading import base_of, loader, logits
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.engine.quantize.registry import METHODS

RANK = 8
LOFTQ: dict[str, Any] = {"method": "loftq", "bits": 3, "rank": RANK, "iterations": 3}
APIQ: dict[str, Any] = {"method": "apiq", "bits": 2, "rank": RANK, "steps": 60, "learning_rate": 2e-3}
METHODS_OF_THIS_FILE = {
    "loftq": LOFTQ,
    "loftq-affine": LOFTQ | {"base": "affine", "symmetric": False},
    "apiq-block": APIQ | {"steps": 20},
    "apiq-layer": APIQ | {"steps": 10, "granularity": "layer"},
}


def errors(report: Report) -> dict[str, float]:
    return {linear.name: linear.weight_error for block in report.blocks for linear in block.linears}


@pytest.mark.parametrize("base", ["normal-float", "affine"])
def test_loftq_s_weights_are_nearer_than_round_to_nearest_s(base: str, small_model: Path, tmp_path: Path) -> None:
    ours = run_job(small_model, tmp_path / "loftq", **(LOFTQ | {"base": base})).report
    alone = run_job(small_model, tmp_path / "rtn", method="rtn", bits=3).report
    linear = ours.blocks[0].linears[0]
    assert (linear.form, linear.rank) == (Form.AFFINE if base == "affine" else Form.CODEBOOK, RANK)
    assert errors(ours).keys() == errors(alone).keys()
    assert all(error < 0.9 * errors(alone)[name] for name, error in errors(ours).items())
    assert ours.quality is not None
    assert alone.quality is not None
    assert ours.quality.kl_divergence < 0.9 * alone.quality.kl_divergence


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_apiq_keeps_more_of_the_model_than_rounding_with_the_best_factors(
    granularity: str, small_model: Path, tmp_path: Path
) -> None:
    """One iteration of LoftQ on the same grid is RTN and the SVD of what it loses."""
    grid = {"bits": 2, "rank": RANK, "symmetric": False}
    fixed = LOFTQ | grid | {"base": "affine", "iterations": 1}
    found = []
    for number, spec in enumerate((APIQ | grid | {"granularity": granularity}, fixed)):
        quality = run_job(small_model, tmp_path / str(number), **spec).report.quality
        assert quality is not None
        found.append(quality.kl_divergence)
    assert found[0] < 0.9 * found[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("spec", METHODS_OF_THIS_FILE.values(), ids=METHODS_OF_THIS_FILE)
def test_stock_peft_gives_the_logits_of_the_engine(
    engine_logits: list[tuple[Tensor, Tensor]], spec: dict[str, Any], single_model: Path, tmp_path: Path
) -> None:
    packed = spec["method"] == "apiq" or spec.get("base") == "affine"
    formats = ["merged", "peft", *(["compressed-tensors"] if packed else [])]
    result = run_job(single_model, tmp_path, formats=formats, **spec)
    ids, expected = engine_logits[0]
    for name in {*formats, "native"} - {"peft"}:
        base = base_of(tmp_path / result.checkpoints[name])
        alone = logits(base, ids)
        model = PeftModel.from_pretrained(base, tmp_path / result.checkpoints["peft"])
        assert (logits(model, ids) - expected).abs().max() < 1e-5, name
        assert (alone - expected).abs().max() > 1e-3, "the correction is at work"
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha) == (RANK, 16)
    whole = loader(tmp_path / result.checkpoints["native"]).load(tmp_path / result.checkpoints["native"])
    assert (logits(whole, ids) - expected).abs().max() < 1e-5


class Interrupted(Exception):
    pass


def stopping_before(index: int, quantize: Callable[[BlockTask, Any], BlockResult]) -> Any:
    def stop(task: BlockTask, spec: Any) -> BlockResult:
        if task.index == index:
            raise Interrupted
        return quantize(task, spec)

    return stop


@pytest.mark.parametrize("spec", METHODS_OF_THIS_FILE.values(), ids=METHODS_OF_THIS_FILE)
def test_an_interrupted_job_ends_with_the_same_tensors(
    spec: dict[str, Any], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(small_model, tmp_path / "whole", **spec)
    method = METHODS[spec["method"]]
    with monkeypatch.context() as patch:
        patch.setattr(method, "quantize_block", stopping_before(2, method.quantize_block))
        with pytest.raises(Interrupted):
            run_job(small_model, tmp_path / "cut", **spec)
    resumed = run_job(small_model, tmp_path / "cut", **spec)
    assert (resumed.report.blocks_computed, resumed.report.blocks_resumed) == (1, 2)
    assert resumed.report.quality == whole.report.quality
    for name, folder in whole.checkpoints.items():
        for file in (tmp_path / "whole" / folder).glob("*.safetensors"):
            theirs = load_file(tmp_path / "cut" / folder / file.name)
            assert all(torch.equal(t, theirs[key]) for key, t in load_file(file).items()), (name, file.name)
