"""The same engine on a GPU: same request and plan, same codes; close to the CPU."""

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


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_gpu_gives_the_same_codes_again(
    place: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "host":
        monkeypatch.setattr(plan, "ACTIVATION_SHARE", 0.0)
    first, again = (run_job(small_model, tmp_path / name, **ON_GPU, **TUNED).report for name in "ab")
    assert first.plan["activations"] == place
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert first.peak_memory.device_bytes
    assert first.quality == again.quality


def test_rounding_is_the_same_wherever_activations_live(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = run_job(small_model, tmp_path / "a", **ON_GPU).report
    monkeypatch.setattr(plan, "ACTIVATION_SHARE", 0.0)
    on_host = run_job(small_model, tmp_path / "b", **ON_GPU).report
    assert (on_device.plan["activations"], on_host.plan["activations"]) == ("device", "host")
    assert on_device.quality == on_host.quality


def test_a_gpu_and_a_cpu_round_alike(small_model: Path, tmp_path: Path) -> None:
    on_gpu = run_job(small_model, tmp_path / "a", **ON_GPU).report
    on_cpu = run_job(small_model, tmp_path / "b").report
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert on_gpu.quality is not None
    assert on_cpu.quality is not None
    assert on_gpu.quality.kl_divergence == pytest.approx(on_cpu.quality.kl_divergence, rel=0.05)
