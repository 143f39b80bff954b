"""Finetuning on a GPU: it learns as on a CPU, repeats itself bit for bit, and goes on where it was killed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.events import LogEvent
from bitwright.report import FinetuningReport
from tests.engine.finetune.test_stage import Job, rows
from tests.engine.finetune.test_trainer import Interrupted, interrupt_at
from workers.engine import memory
from workers.engine.finetune import captured_passes
from workers.engine.finetune.resident_model import ResidentModel
from workers.engine.text.packing import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
__all__ = ["rows"]  # the fixture
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora on a codebook": ({"method": "nf", "group_size": 32}, {"kind": "lora"}),
    "lora on 2 bits": ({"bits": 2, "symmetric": False}, {"kind": "lora", "dropout": 0.1}),
    "qa-lora": ({"symmetric": False}, {"kind": "qa-lora"}),
    "q-bara": ({"bits": 4}, {"kind": "q-bara"}),
    "qa-hira": ({"symmetric": False}, {"kind": "qa-hira"}),
    "bayesian-lora": ({"bits": 4}, {"kind": "bayesian-lora"}),
}


def finetuned(job: Job, *given: Any, **fields: Any) -> FinetuningReport:
    found = job.run(*given, **fields).finetuning
    assert found is not None
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_a_gpu_learns_as_a_cpu_does(arm: str, small_model: Path, rows: Path, tmp_path: Path) -> None:
    """bf16 products are summed in another order there, so losses agree, and not their bits."""
    quantization, adapter = ARMS[arm]
    on_gpu = finetuned(Job(tmp_path / "gpu", device="cuda"), small_model, rows, quantization, adapter)
    on_cpu = finetuned(Job(tmp_path / "cpu"), small_model, rows, quantization, adapter)
    assert on_gpu.trainable_parameters == on_cpu.trainable_parameters
    assert on_gpu.peak_device_bytes
    assert on_gpu.loss_before == pytest.approx(on_cpu.loss_before, rel=0.01)
    assert on_gpu.losses[0].loss == pytest.approx(on_cpu.losses[0].loss, rel=0.01)
    assert on_gpu.loss_before is not None
    assert on_gpu.loss_after is not None
    assert on_gpu.loss_after < on_gpu.loss_before
    if not adapter.get("dropout") and adapter["kind"] != "bayesian-lora":  # the devices draw other random numbers
        assert on_gpu.loss_after == pytest.approx(on_cpu.loss_after, rel=0.05)


@pytest.mark.parametrize("arm", ARMS)
def test_a_killed_job_ends_with_the_adapters_of_an_undisturbed_one(
    arm: str, small_model: Path, rows: Path, tmp_path: Path
) -> None:
    quantization, adapter = ARMS[arm]
    whole, cut = (Job(tmp_path / name, device="cuda") for name in ("whole", "cut"))
    whole.run(small_model, rows, quantization, adapter)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted):
            cut.run(small_model, rows, quantization, adapter)
    assert finetuned(cut, small_model, rows, quantization, adapter).steps_resumed == 5
    expected = whole.trained()
    assert [name for name, tensor in cut.trained().items() if not torch.equal(tensor, expected[name])] == []
    assert "training_not_deterministic" not in {line.event for line in whole.told(LogEvent)}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Batches that went through captured passes."""
    runs, replay = list[Batch](), captured_passes._Graphs.run

    def counted(graphs: Any, batch: Batch, targets: int) -> Tensor:
        runs.append(batch)
        return replay(graphs, batch, targets)

    monkeypatch.setattr(captured_passes._Graphs, "run", counted)
    return runs


@pytest.mark.parametrize("arm", ARMS)
def test_captured_passes_train_what_eager_ones_do(
    arm: str,
    small_model: Path,
    rows: Path,
    tmp_path: Path,
    replayed: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, with batches of several shapes: the rows differ in length, and do not share sequences."""
    quantization, adapter = ARMS[arm]
    captured, eager = (Job(tmp_path / name, device="cuda") for name in ("captured", "eager"))
    finetuned(captured, small_model, rows, quantization, adapter, packing=False)
    assert len(replayed) > 10
    assert "training_capture_failed" not in {line.event for line in captured.told(LogEvent)}
    monkeypatch.setattr(captured_passes, "MOST_SHAPES", 0)
    before = len(replayed)
    finetuned(eager, small_model, rows, quantization, adapter, packing=False)
    assert len(replayed) == before
    expected = eager.trained()
    assert [name for name, tensor in captured.trained().items() if not torch.equal(tensor, expected[name])] == []


def test_captured_passes_train_what_eager_ones_do_with_weights_made_anew(
    small_model: Path, rows: Path, tmp_path: Path, replayed: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a large model; sequences hold several examples here."""
    kept, made = (Job(tmp_path / name, device="cuda") for name in ("kept", "made"))
    with monkeypatch.context() as patch:
        patch.setattr(captured_passes, "MOST_SHAPES", 0)
        finetuned(kept, small_model, rows)
    assert not replayed
    monkeypatch.setitem(memory.KEPT_SHARE, "cuda", 0.0)
    assert not finetuned(made, small_model, rows).weights_kept
    assert any(batch.documents is not None for batch in replayed)
    assert "training_capture_failed" not in {line.event for line in made.told(LogEvent)}
    expected = kept.trained()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.trained().items())


@pytest.mark.parametrize("arm", ARMS)
def test_captured_passes_that_compute_blocks_again_train_what_eager_ones_do(
    arm: str, small_model: Path, rows: Path, tmp_path: Path, replayed: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and what steps train that compute nothing again; dropout is not captured then."""
    quantization, adapter = ARMS[arm]
    names = ("captured", "eager", "whole")
    captured, eager, whole = (Job(tmp_path / name, device="cuda") for name in names)
    finetuned(captured, small_model, rows, quantization, adapter, gradient_checkpointing=True)
    assert bool(replayed) == (not adapter.get("dropout"))
    assert "training_capture_failed" not in {line.event for line in captured.told(LogEvent)}
    monkeypatch.setattr(captured_passes, "MOST_SHAPES", 0)
    finetuned(eager, small_model, rows, quantization, adapter, gradient_checkpointing=True)
    finetuned(whole, small_model, rows, quantization, adapter, gradient_checkpointing=False)
    for other in (eager.trained(), whole.trained()):
        assert [name for name, tensor in captured.trained().items() if not torch.equal(tensor, other[name])] == []


def test_where_a_capture_fails_training_goes_on(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the capture: there the pass waits for the device."""
    whole, failing = (Job(tmp_path / name, device="cuda") for name in ("whole", "failing"))
    finetuned(whole, small_model, rows)
    hidden = ResidentModel.hidden

    def waiting(self: ResidentModel, batch: Batch) -> Tensor:
        found = hidden(self, batch)
        if torch.cuda.is_current_stream_capturing():
            float(found.sum())
        return found

    monkeypatch.setattr(ResidentModel, "hidden", waiting)
    finetuned(failing, small_model, rows)
    assert "training_capture_failed" in {line.event for line in failing.told(LogEvent)}
    expected = whole.trained()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in failing.trained().items())


def test_weights_made_anew_train_the_same_adapters_as_kept_ones(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations recomputed, too."""
    kept = Job(tmp_path / "kept", device="cuda")
    kept.run(small_model, rows)
    made = Job(tmp_path / "made", device="cuda")
    monkeypatch.setitem(memory.KEPT_SHARE, "cuda", 0.0)
    report = finetuned(made, small_model, rows, gradient_checkpointing=True)
    assert not report.weights_kept
    expected = kept.trained()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.trained().items())
