"""Sizes of files that a dry run tells, against those of the files that the job writes."""

from pathlib import Path
from typing import Any

import pytest

from app.domain.estimates import estimate
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from app.domain.request.job_request import JobRequest
from tests.engine.conftest import run_job

EVERY: dict[str, Any] = {"embeddings": 4, "head": 4}
CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "formats": ["compressed-tensors", "merged"]},
    "3 bits with zero points": {"bits": 3, "symmetric": False, "formats": ["compressed-tensors"]},
    "per channel": {"bits": 8, "group_size": -1, "formats": ["compressed-tensors"]},
    "gguf, 2 bits": {"bits": 2, "formats": ["gguf"]},
    "gguf, 5 bits with zero points": {"bits": 5, "symmetric": False, "formats": ["gguf"]},
    "gguf, all of it": {"bits": 4, "modules": {"embeddings": 8, "head": 6}, "formats": ["gguf"]},
    "gguf, a type": {"scheme": "q4_k", "formats": ["gguf"]},
    "gguf, a mix": {"scheme": "q4_k_m", "formats": ["gguf"]},
    "all of it": {"bits": 4, "modules": EVERY, "formats": ["compressed-tensors", "merged"]},
    "embeddings": {"bits": 2, "modules": {"embeddings": {"bits": 4, "group_size": 16}}, "formats": ["merged"]},
    "FP8": {"scheme": "fp8", "formats": ["merged"]},
    "NVFP4": {"scheme": "nvfp4a16", "modules": {"embeddings": "nvfp4a16"}, "formats": ["merged"]},
    "NormalFloat": {"method": "nf", "bits": 4, "group_size": 64, "formats": ["merged"]},
    "factors": {"method": "loftq", "rank": 4, "iterations": 1, "formats": ["merged", "peft"]},
    "mlx": {"bits": 4, "symmetric": False, "modules": EVERY, "formats": ["mlx"]},
    "gptq": {"bits": 4, "formats": ["gptq"]},
    "awq": {"bits": 4, "symmetric": False, "formats": ["awq"]},
    "bitsandbytes": {"method": "nf", "bits": 4, "group_size": 64, "formats": ["bitsandbytes"]},
    "compressed-tensors, FP8": {"scheme": "fp8", "formats": ["compressed-tensors"]},
    "compressed-tensors, NVFP4": {"scheme": "nvfp4a16", "formats": ["compressed-tensors"]},
    "without a model": {"bits": 4, "weights_only": True, "modules": EVERY, "formats": ["compressed-tensors"]},
}


@pytest.mark.parametrize("case", CASES)
def test_the_dry_run_tells_the_size_of_the_files(case: str, small_model: Path, tmp_path: Path) -> None:
    fields = dict(CASES[case])
    formats = fields.pop("formats")
    integers = {} if "scheme" in fields else {"bits": 4, "group_size": 32}
    body = {"quantization": {"method": "rtn", **integers, **fields}, "formats": formats, "evaluation": None}
    request = JobRequest.parse({"model": str(small_model), **body})
    told = estimate(request, inspect_checkpoint(FolderFiles(small_model)))
    found = run_job(small_model, tmp_path, **body)
    size = found.report.size
    assert told["bytes_files"].keys() == size.bytes_files.keys()
    for name, real in size.bytes_files.items():
        # A GGUF file's vocabulary is a tenth of a file as small as this, and counted by the token.
        near = 0.05 if name == "gguf" else 0.015
        assert told["bytes_files"][name] == pytest.approx(real, rel=near), (name, real)
    assert told["bits_per_weight_model"] == pytest.approx(size.bits_per_weight_model, rel=0.02)
    assert told["weights_quantized"] == size.quantized_weights
    assert next(iter(told)) == "bytes_files"
