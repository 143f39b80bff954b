"""Codebooks and low-rank factors from a method through resume, evaluation and every format, in the real engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine, ResultLine
from app.domain.formats import ExportFormat
from app.domain.methods import Form
from bitwright.errors import InvalidRequest
from bitwright.events import WarningEvent
from bitwright.report import Report
from tests.engine.conftest import run_job
from tests.engine.model.loading import base_of, loader, logits
from tests.engine.quantize import residual_svd
from tests.reports import REPORTS

RANK = 4
CODEBOOK: dict[str, Any] = {"method": "residual-svd", "bits": 3, "rank": RANK, "superblock": 16}
AFFINE: dict[str, Any] = {"method": "residual-svd", "bits": 3, "rank": RANK, "base": "affine"}


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> residual_svd.ResidualSVD:
    return residual_svd.register(monkeypatch)


def linears(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            yield name, parameter


def test_codebooks_and_factors_are_reported_as_they_are(
    method: residual_svd.ResidualSVD, small_model: Path, tmp_path: Path
) -> None:
    reports = [run_job(small_model, tmp_path / str(rank), **(CODEBOOK | {"rank": rank})).report for rank in (RANK, 0)]
    report, plain = reports
    linear = report.blocks[0].linears[0]
    assert (linear.form, linear.bits, linear.group_size, linear.rank) == (Form.CODEBOOK, 3, 32, RANK)
    assert plain.blocks[0].linears[0].rank is None
    for ours, theirs in zip(report.blocks, plain.blocks, strict=True):
        assert all(a.weight_error < 0.98 * b.weight_error for a, b in zip(ours.linears, theirs.linears, strict=True))
    weights, shapes = report.size.quantized_weights, [(64, 64), (32, 64), (32, 64), (64, 64)]
    shapes += [(192, 64), (192, 64), (64, 192)]
    parts = report.size.parts
    assert parts is not None
    assert parts.codes == 3
    groups = weights / 32
    superblocks = sum(-(-out * width // (32 * 16)) for out, width in shapes) * 3
    assert parts.scales * weights == pytest.approx(8 * groups + 32 * superblocks + 32 * len(shapes) * 3)
    assert parts.codebooks * weights == pytest.approx(32 * 8 * len(shapes) * 3)
    assert parts.adapters * weights == pytest.approx(16 * RANK * sum(map(sum, shapes)) * 3)
    assert sum(parts.model_dump().values()) == pytest.approx(report.size.bits_per_weight)
    assert plain.size.parts is not None
    assert plain.size.parts.adapters == 0


def test_factors_bring_the_model_nearer_in_the_engine_s_own_measure(
    method: residual_svd.ResidualSVD, small_model: Path, tmp_path: Path
) -> None:
    """Activations through the quantized blocks see the factors: more of them, less divergence."""
    found = []
    for rank in (0, 4, 32):
        quality = run_job(small_model, tmp_path / str(rank), **(CODEBOOK | {"bits": 2, "rank": rank})).report.quality
        assert quality is not None
        found.append(quality.kl_divergence)
    assert found[0] > 1.05 * found[1] > 1.5 * found[2]


@pytest.mark.parametrize("spec", [CODEBOOK, AFFINE], ids=["codebook", "affine"])
def test_an_interrupted_job_goes_on_with_every_form(
    method: residual_svd.ResidualSVD, spec: dict[str, Any], small_model: Path, tmp_path: Path
) -> None:
    whole = run_job(small_model, tmp_path / "whole", **spec)
    method.stop_at = 2
    with pytest.raises(residual_svd.Interrupted):
        run_job(small_model, tmp_path / "cut", **spec)
    method.stop_at, method.seen = None, []
    resumed = run_job(small_model, tmp_path / "cut", **spec)
    assert method.seen == [2]
    assert (resumed.report.blocks_computed, resumed.report.blocks_resumed) == (1, 2)
    assert resumed.report.quality == whole.report.quality
    assert resumed.report.size == whole.report.size
    for name, folder in whole.checkpoints.items():
        for file in (tmp_path / "whole" / folder).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "cut" / folder / file.name).read_bytes(), (name, file.name)
            assert len(load_file(file)) > 0


def test_a_damaged_shard_of_factors_is_not_adopted(
    method: residual_svd.ResidualSVD, small_model: Path, tmp_path: Path
) -> None:
    method.stop_at = 2
    with pytest.raises(residual_svd.Interrupted):
        run_job(small_model, tmp_path, **CODEBOOK)
    shard = tmp_path / "state" / "block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    method.stop_at, method.seen = None, []
    assert run_job(small_model, tmp_path, **CODEBOOK).report.blocks_resumed == 1
    assert method.seen == [1, 2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("spec", "formats"),
    [
        (CODEBOOK, ["merged", "peft"]),
        (CODEBOOK | {"alpha": 2.0, "superblock": 0}, ["peft"]),
        (AFFINE | {"alpha": 4.0}, ["compressed-tensors", "merged", "peft"]),
    ],
    ids=["codebook", "adapter-alone", "affine"],
)
def test_stock_peft_gives_the_logits_of_the_engine(
    method: residual_svd.ResidualSVD,
    engine_logits: list[tuple[Tensor, Tensor]],
    spec: dict[str, Any],
    formats: list[str],
    single_model: Path,
    tmp_path: Path,
) -> None:
    result = run_job(single_model, tmp_path, formats=formats, **spec)
    ids, expected = engine_logits[0]
    assert expected.dtype == torch.float32
    assert set(result.checkpoints) == {*formats, "native"}
    adapter = tmp_path / result.checkpoints["peft"]
    for name in {*formats, "native"} - {"peft"}:
        base = base_of(tmp_path / result.checkpoints[name])
        alone = logits(base, ids)
        model = PeftModel.from_pretrained(base, adapter)
        assert (logits(model, ids) - expected).abs().max() < 1e-5, name
        assert (alone - expected).abs().max() > 1e-2, "the correction is at work"
        merged = model.merge_and_unload()
        assert (logits(merged, ids) - expected).abs().max() < 1e-5
    whole = loader(tmp_path / result.checkpoints["native"]).load(tmp_path / result.checkpoints["native"])
    assert (logits(whole, ids) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_training_goes_on_from_the_adapter(
    method: residual_svd.ResidualSVD, single_model: Path, tmp_path: Path
) -> None:
    result = run_job(single_model, tmp_path, formats=["merged", "peft"], **CODEBOOK)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints["merged"])
    model = PeftModel.from_pretrained(base, tmp_path / result.checkpoints["peft"], is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 3
    ids = torch.randint(0, 400, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(ids, labels=ids).loss
    before.backward()
    with torch.no_grad():
        for parameter in trained.values():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
            parameter.sub_(parameter.grad, alpha=0.01)
    assert model(ids, labels=ids).loss < before


@pytest.mark.parametrize("model", ["small", "single"])
def test_what_is_merged_is_what_the_engine_measured(
    method: residual_svd.ResidualSVD,
    engine_logits: list[tuple[Tensor, Tensor]],
    model: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    source = request.getfixturevalue(f"{model}_model")
    result = run_job(source, tmp_path, formats=["merged"], **CODEBOOK)
    merged, native = (tmp_path / result.checkpoints[name] for name in ("merged", "native"))
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert not (merged / "load_bitwright.py").exists()
    by_loader = dict(linears(loader(native).load(native)))
    for name, weight in linears(loaded):
        assert torch.equal(weight, by_loader[name]), name
    ids, expected = engine_logits[0]
    assert (logits(loaded, ids) - expected).abs().max() < (1e-5 if model == "single" else 0.1)


def test_every_checkpoint_but_native_is_the_base_alone_beside_an_adapter(
    method: residual_svd.ResidualSVD, small_model: Path, tmp_path: Path
) -> None:
    result = run_job(small_model, tmp_path, formats=["merged", "peft", "compressed-tensors"], **AFFINE)
    folders = {name: tmp_path / folder for name, folder in result.checkpoints.items()}
    base = dict(linears(loader(folders["native"]).load(folders["native"], merge=False)))
    whole = dict(linears(loader(folders["native"]).load(folders["native"])))
    for name, weight in linears(AutoModelForCausalLM.from_pretrained(folders["merged"])):
        assert torch.equal(weight, base[name])
        assert not torch.equal(weight, whole[name])
    assert "lora" not in " ".join(load_file(folders["compressed-tensors"] / "model.safetensors"))
    for name in ("merged", "compressed-tensors"):
        assert "quantized base alone" in (folders[name] / "README.md").read_text()
    assert {file.name for file in folders["peft"].iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", *REPORTS)
    }
    for folder in folders.values():
        assert Report.model_validate_json((folder / "report.json").read_text()) == result.report


def test_scales_are_not_tuned_end_to_end_where_there_are_none(
    method: residual_svd.ResidualSVD, small_model: Path, tmp_path: Path
) -> None:
    lines: list[AttemptLine] = []
    result: ResultLine = run_job(small_model, tmp_path, lines, **(AFFINE | {"scale_steps": 5}))
    assert result.report.scales is None
    warnings = {line.code: line.message for line in lines if isinstance(line, WarningEvent)}
    assert "only integers and floating-point codes without low-rank factors" in warnings["scale_tuning_skipped"]


def test_a_request_that_names_no_formats_gets_those_that_hold_the_result(
    method: residual_svd.ResidualSVD, small_model: Path
) -> None:
    for spec, formats in ((CODEBOOK, ("merged", "peft")), (AFFINE, ("compressed-tensors", "peft"))):
        request = residual_svd.AnyMethodRequest.parse({"model": "org/name", "quantization": spec})
        assert request.formats == tuple(ExportFormat(name) for name in formats)
        assert residual_svd.AnyMethodRequest.parse(request.model_dump(mode="json")) == request


@pytest.mark.parametrize(
    ("spec", "formats", "words"),
    [
        (CODEBOOK, ["compressed-tensors", "peft"], "cannot hold the codebook weights of residual-svd"),
        (AFFINE, ["compressed-tensors"], 'add "peft" to formats'),
        (CODEBOOK | {"rank": 0}, ["peft"], "makes none"),
    ],
)
def test_the_request_is_refused_where_a_format_cannot_hold_the_result(
    method: residual_svd.ResidualSVD, spec: dict[str, Any], formats: list[str], words: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        residual_svd.AnyMethodRequest.parse({"model": "org/name", "quantization": spec, "formats": formats})
    assert [(problem.field, problem.code) for problem in refused.value.errors] == [("formats.0", "format_cannot_hold")]
    assert words in refused.value.errors[0].detail
