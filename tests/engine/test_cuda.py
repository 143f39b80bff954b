"""The same engine on a GPU: same request, same codes; where activations live changes nothing; close to the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import run_job
from workers.engine import plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TUNED: dict[str, Any] = {"method": "signround", "bits": 3, "steps": 12, "batch_size": 4, "learning_rate": 0.05}
ON_GPU: dict[str, Any] = {"order": {"device": "cuda"}}


def codes(workspace: Path) -> dict[str, torch.Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


def differing(first: Path, second: Path) -> list[str]:
    one, other = codes(first), codes(second)
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_a_gpu_gives_the_same_codes_again_wherever_activations_live(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_job(small_model, tmp_path / "a", **ON_GPU, **TUNED).report
    run_job(small_model, tmp_path / "b", **ON_GPU, **TUNED)
    assert differing(tmp_path / "a", tmp_path / "b") == []
    monkeypatch.setattr(plan, "ACTIVATION_SHARE", 0.0)
    host = run_job(small_model, tmp_path / "c", **ON_GPU, **TUNED).report
    assert (first.plan["activations"], host.plan["activations"]) == ("device", "host")
    assert differing(tmp_path / "a", tmp_path / "c") == []
    assert first.peak_memory.device_bytes
    assert first.quality == host.quality


def test_a_gpu_and_a_cpu_round_alike(small_model: Path, tmp_path: Path) -> None:
    on_gpu = run_job(small_model, tmp_path / "a", **ON_GPU).report
    on_cpu = run_job(small_model, tmp_path / "b").report
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert on_gpu.quality is not None
    assert on_cpu.quality is not None
    assert on_gpu.quality.kl_divergence == pytest.approx(on_cpu.quality.kl_divergence, rel=0.05)
