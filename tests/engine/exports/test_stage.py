"""Exports of real results: the same checkpoints as the job that made the result would have written, and no model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.domain.formats import ExportFormat
from app.domain.methods import Form, Scheme, SchemeName
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from bitwright.report import Report
from tests.engine.conftest import run_job
from tests.engine.exports.checkpoints import assert_same, tensors
from tests.engine.exports.orders import export
from tests.formats.examples import Made, codebook_made, scheme, tiny_llama, write_quantized
from tests.tiny_model import tiny_model_folder

PACKED = ["compressed-tensors", "gguf", "gptq", "awq", "mlx", "merged"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints of a job that has made all formats at once, by name."""
    workspace = tmp_path_factory.mktemp("job")
    done = run_job(tiny_model_folder(), workspace, method="rtn", bits=4, group_size=64, formats=PACKED)
    return {name: workspace / path for name, path in done.checkpoints.items()}


def test_exports_are_what_the_job_itself_writes(job: dict[str, Path], tmp_path: Path) -> None:
    done = export(job["native"], tmp_path, PACKED)
    assert done.checkpoints == {name: f"output/{name}" for name in PACKED}
    for name in PACKED:
        assert_same(tmp_path / "output" / name, job[name])


def test_a_gguf_export_has_the_importance_matrix_of_the_jobs_own_text(tmp_path: Path) -> None:
    """The same bytes as of a job that asked for gguf at once; without the sums there is none, and the card says so."""
    made = {}
    for formats in (["gguf"], ["native"]):
        done = run_job(tiny_model_folder(), tmp_path / formats[0], method="gptq", group_size=64, formats=formats)
        made[formats[0]] = tmp_path / formats[0] / done.checkpoints["native"]
    export(made["native"], tmp_path / "later", ["gguf"])
    later, own = tmp_path / "later/output/gguf", made["gguf"].parent / "gguf"
    assert (later / "model.imatrix").read_bytes() == (own / "model.imatrix").read_bytes()
    assert "llama-quantize --imatrix model.imatrix" in (later / "README.md").read_text()
    (made["native"] / "inputs.safetensors").unlink()
    export(made["native"], tmp_path / "without", ["gguf"])
    without = tmp_path / "without/output/gguf"
    assert not (without / "model.imatrix").exists()
    assert "the job kept no sums of squared inputs" in (without / "README.md").read_text()


def test_the_report_is_the_jobs_and_says_where_it_comes_from(job: dict[str, Path], tmp_path: Path) -> None:
    report = export(job["native"], tmp_path, ["gptq"]).report
    before = Report.model_validate_json((job["native"] / "report.json").read_bytes())
    assert report.exported_from == "job_1"
    assert (report.quality, report.blocks) == (before.quality, before.blocks)
    size = (tmp_path / "output" / "gptq" / "model.safetensors").stat().st_size
    assert report.size == before.size.model_copy(update={"bytes_files": {"gptq": size}})
    assert report.loads == ()
    assert report.plan["export"] is True
    assert "quantize" in before.seconds.keys() - report.seconds.keys(), "its own clock, and no block is computed again"
    card, own = ((folder / "README.md").read_text() for folder in (tmp_path / "output" / "gptq", job["gptq"]))
    added = "- Exported from the result of job `job_1`, whose codes and figures these are\n"
    assert added in card
    assert card.replace(added, "") == own


def test_no_model_is_built(job: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    export(job["native"], tmp_path, ["compressed-tensors", "awq", "mlx"])


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return tiny_llama(tmp_path / "source")


def native_of(source: Any, folder: Path, made: list[Made]) -> Path:
    write_quantized(source, folder / "native", ExportFormat.NATIVE, made)
    return folder / "native"


FORMS: dict[str, tuple[list[Made], list[str]]] = {
    "zero points": ([Made(scheme(4, 32, False))], ["gptq-v2", "awq", "mlx", "compressed-tensors"]),
    "offsets": ([Made(scheme(4, 32, False), offset=True)], ["mlx", "merged"]),
    "widths": ([Made(scheme(4, 32, True)), Made(scheme(8, 32, True))], ["gptq", "mlx", "compressed-tensors"]),
    "NF4": ([codebook_made(4, 32)], ["bitsandbytes", "merged"]),
    "NVFP4": ([Made(Scheme.named(SchemeName.NVFP4), Form.FLOAT)], ["compressed-tensors", "merged"]),
    "FP8": ([Made(Scheme.named(SchemeName.FP8_BLOCK), Form.FLOAT)], ["compressed-tensors", "merged"]),
    "INT8": ([Made(Scheme.named(SchemeName.INT8))], ["compressed-tensors", "merged"]),
    "MX": (
        [Made(Scheme.named(name), Form.FLOAT) for name in (SchemeName.MXFP4A16, SchemeName.MXFP8A16)],
        ["compressed-tensors", "mlx"],
    ),
    "factors": ([Made(scheme(4, 32, True), rank=2)], ["compressed-tensors", "peft"]),
    "factors of NF4": ([codebook_made(4, 32, rank=2)], ["bitsandbytes", "peft"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_exported_as_it_would_be_written(source: Any, tmp_path: Path, name: str) -> None:
    made, formats = FORMS[name]
    native = native_of(source, tmp_path / "base", made)
    export(native, tmp_path / "work", formats)
    for export_format in formats:
        own = tmp_path / "own" / export_format
        write_quantized(source, own, ExportFormat(export_format), made, formats=[ExportFormat(f) for f in formats])
        ours, theirs = tensors(tmp_path / "work" / "output" / export_format), tensors(own)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype is theirs[key].dtype
            assert torch.equal(tensor.flatten().view(torch.uint8), theirs[key].flatten().view(torch.uint8)), key


def test_scales_of_fp16_are_rounded_for_a_model_in_bf16_and_told(tmp_path: Path) -> None:
    asymmetric: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False}
    done = run_job(tiny_model_folder(), tmp_path / "base", method="rtn", **asymmetric, formats=["gguf"])
    native = tmp_path / "base" / done.checkpoints["native"]
    report = export(native, tmp_path / "work", ["compressed-tensors", "gguf", "merged"]).report
    assert report.scales_rounded.keys() == {"compressed-tensors"}
    error = report.scales_rounded["compressed-tensors"]
    assert 2**-12 < error <= 2**-8
    told = f"compressed-tensors: re-rounded scales, largest relative error {error:.2g}"
    assert told in report.warnings
    assert told in (tmp_path / "work/output/compressed-tensors/README.md").read_text()
    stored, before = tensors(tmp_path / "work/output/compressed-tensors"), tensors(native)
    for key, scale in stored.items():
        if key.endswith("weight_scale"):
            made = before[key.removesuffix("weight_scale") + "scale"]
            assert made.dtype is torch.float16
            assert torch.equal(scale, made.to(torch.bfloat16))


def test_a_scale_beyond_the_formats_dtype_is_refused(source: Any, tmp_path: Path) -> None:
    native = native_of(source, tmp_path / "base", [Made(scheme(4, 32, True))])
    stored = load_file(native / "weights.safetensors")
    stored["model.layers.1.mlp.up_proj.scale"][3, 0] = 1e6
    save_file(stored, native / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatCannotHold, match=r"does not hold one of model\.layers\.1\.mlp\.up_proj") as caught:
        export(native, tmp_path / "work", ["gptq"])
    assert '["compressed-tensors"]' in str(caught.value.hint)
    export(native, tmp_path / "other", ["compressed-tensors"])


def test_outputs_that_words_cannot_hold_are_refused_before_anything_is_written(source: Any, tmp_path: Path) -> None:
    native = native_of(source, tmp_path / "base", [Made(scheme(4, 32, True))])
    stored = load_file(native / "weights.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    stored |= {f"{name}.{part}": stored[f"{name}.{part}"][:24].clone() for part in ("codes", "scale")}
    stored[f"{name}.shape"] = torch.tensor([24, 64])
    save_file(stored, native / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatCannotHold, match=f"{name} has 24 outputs"):
        export(native, tmp_path / "work", ["awq"])
    assert not (tmp_path / "work" / "output").exists()


def broken(native: Path) -> Iterator[tuple[str, Any]]:
    stored = load_file(native / "weights.safetensors")
    name = "model.layers.0.mlp.up_proj"
    yield "a lost tensor", {key: t for key, t in stored.items() if key != f"{name}.scale"}
    yield "a lost shape", {key: t for key, t in stored.items() if key != f"{name}.shape"}
    yield "no shape", stored | {f"{name}.shape": torch.tensor([0, 64])}
    yield "another shape", stored | {f"{name}.shape": torch.tensor([32, 64])}


def test_a_damaged_native_checkpoint_is_named(source: Any, tmp_path: Path) -> None:
    native = native_of(source, tmp_path / "base", [Made(scheme(4, 32, True))])
    for what, content in list(broken(native)):
        save_file(content, native / "weights.safetensors", metadata={"format": "pt"})
        with pytest.raises(CorruptCheckpoint) as caught:
            export(native, tmp_path / "work", ["compressed-tensors"])
        assert caught.value.field == "base_job", what
    (native / "report.json").write_text(json.dumps({"version": "0"}))
    with pytest.raises(CorruptCheckpoint, match="another version"):
        export(native, tmp_path / "work", ["compressed-tensors"])
