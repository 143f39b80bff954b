"""Scales of several formats from one job: the dtype that they are fitted in, and what is rounded after all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain.formats import ExportFormat
from bitwright.errors import FormatCannotHold
from tests.engine.conftest import run_job
from tests.formats.examples import codebook_made, random_result, scheme
from tests.tiny_model import tiny_model_folder
from workers.engine.plan import scale_dtype_of
from workers.engine.stored_scales import StoredScales

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CT, GGUF, GPTQ, MLX, NATIVE = (ExportFormat(name) for name in ("compressed-tensors", "gguf", "gptq", "mlx", "native"))


@pytest.mark.parametrize(
    ("formats", "dtype", "fitted"),
    [
        ((CT,), BF16, BF16),
        ((GGUF,), BF16, F16),
        ((GPTQ,), BF16, BF16),
        ((GPTQ, GGUF), BF16, BF16),
        ((GPTQ,), F32, F16),
        ((NATIVE,), F32, F32),
        ((CT, GGUF), BF16, BF16),
        ((GGUF, MLX, NATIVE), BF16, BF16),
        ((CT, GPTQ), F16, F16),
        ((CT, GPTQ), F32, F16),
    ],
    ids=str,
)
def test_scales_are_fitted_to_the_strictest(
    formats: tuple[ExportFormat, ...], dtype: torch.dtype, fitted: torch.dtype
) -> None:
    assert scale_dtype_of(formats, dtype) is fitted


def test_each_format_gets_scales_of_its_own_dtype() -> None:
    scales = StoredScales()
    result = random_result((32, 64), scheme(4, 32, True), BF16)
    stored = scales.of(GGUF, "x", result).affine
    assert stored.scale.dtype is F16
    assert torch.equal(stored.scale.float(), result.affine.scale.float())
    assert torch.equal(stored.dequantize(), result.dequantize())
    assert scales.of(CT, "x", result) is result
    assert scales.of(NATIVE, "x", result) is result
    codebook = random_result((32, 64), codebook_made(4, 32))
    assert scales.of(GGUF, "x", codebook) is codebook
    assert (scales.errors, scales.warnings()) == ({}, {})


def test_what_is_rounded_is_counted_for_each_format() -> None:
    scales, result = StoredScales(), random_result((32, 64), scheme(4, 32, True), BF16)
    tiny = result.affine.scale.clone()
    tiny[0, 0] = 3e-8
    weight = replace(result.affine, scale=tiny)
    scales.of(GPTQ, "a", replace(result, weight=weight))
    scales.of(GPTQ, "b", result)
    (error,) = scales.report().values()
    exact = float(tiny[0, 0].double())
    assert error == abs(float(torch.tensor(exact).half().double()) - exact) / 2**-14
    assert scales.warnings() == {"gptq": f"gptq: re-rounded scales, largest relative error {error:.2g}"}


def test_a_scale_beyond_a_dtype_is_refused() -> None:
    result = random_result((32, 64), scheme(4, 32, True), BF16)
    large = result.affine.scale.clone()
    large[0, 0] = 1e5
    with pytest.raises(FormatCannotHold, match="does not hold one of some") as caught:
        StoredScales().of(GGUF, "some", replace(result, weight=replace(result.affine, scale=large)))
    assert caught.value.field == "formats"


@pytest.mark.parametrize("method", ["rtn", "signround"])
def test_one_job_makes_formats_of_all_scales(method: str, tmp_path: Path) -> None:
    """Codes and scales of `native` are those of a job for the strictest format alone."""
    small = {} if method == "rtn" else {"steps": 2, "scale_steps": 0, "batch_size": 1}
    quantization = {"method": method, "bits": 4, "group_size": 64, **small}
    text: dict[str, Any] = {"calibration": {"num_samples": 2, "sequence_length": 32}, "evaluation": None}
    folder = tiny_model_folder()
    done = run_job(
        folder, tmp_path / "all", quantization=quantization, formats=["compressed-tensors", "gguf", "awq"], **text
    )
    alone = run_job(folder, tmp_path / "one", quantization=quantization, formats=["compressed-tensors"], **text)
    both, one = (tmp_path / name / path.checkpoints["native"] for name, path in (("all", done), ("one", alone)))
    assert (both / "weights.safetensors").read_bytes() == (one / "weights.safetensors").read_bytes()
    assert set(done.checkpoints) == {"compressed-tensors", "gguf", "awq", "native"}
