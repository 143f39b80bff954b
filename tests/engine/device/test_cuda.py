"""The same engine on a GPU: same request and plan, same codes; close to the CPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.domain.attempt_lines import AttemptLine
from bitwright.events import LogEvent
from tests.engine.conftest import run_job
from workers.engine import memory
from workers.engine.device import cuda_graphs
from workers.engine.device.read_ahead import Upload, read_ahead
from workers.engine.device.side_stream import hand_over
from workers.engine.model import fused_blocks
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.scales import tuning
from workers.engine.scales.memory_plan import Fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TUNED: dict[str, Any] = {"method": "signround", "bits": 3, "steps": 12, "batch_size": 4, "learning_rate": 0.05}
SCALED: dict[str, Any] = TUNED | {"bits": 2, "symmetric": False, "scale_steps": 24}
ON_GPU: dict[str, Any] = {"order": {"device": "cuda"}}


def codes(workspace: Path) -> dict[str, torch.Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


def differing(first: Path, second: Path) -> list[str]:
    one, other = codes(first), codes(second)
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_no_kernel_is_compiled_after_the_texts_are_read(small_model: Path, tmp_path: Path) -> None:
    """In a fresh process and with an empty cache: those of the blocks are all compiled by the warm-up."""
    script = (
        "import sys; from pathlib import Path; from triton import knobs\n"
        "from tests.engine.conftest import run_job; from workers.engine import quantize\n"
        "compiled, after_texts = [], quantize.run\n"
        "knobs.runtime.jit_cache_hook = lambda **given: compiled.append(given['fn'].name) and None\n"
        "def watch(*given):\n    compiled.clear()\n    return after_texts(*given)\n"
        "quantize.run = watch\n"
        f"run_job(Path({str(small_model)!r}), Path(sys.argv[1]), order={{'device': 'cuda'}}, **{TUNED!r})\n"
        "print('compiled', sorted(compiled))\n"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "job")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["compiled []"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_gpu_gives_the_same_codes_again(
    place: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "host":
        monkeypatch.setattr(memory, "ACTIVATION_SHARE", 0.0)
    first, again = (run_job(small_model, tmp_path / name, **ON_GPU, **TUNED).report for name in "ab")
    assert first.plan["activations"] == place
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert first.peak_memory.device_bytes
    assert first.quality == again.quality


def test_rounding_is_the_same_wherever_activations_live(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = run_job(small_model, tmp_path / "a", **ON_GPU).report
    monkeypatch.setattr(memory, "ACTIVATION_SHARE", 0.0)
    on_host = run_job(small_model, tmp_path / "b", **ON_GPU).report
    assert (on_device.plan["activations"], on_host.plan["activations"]) == ("device", "host")
    assert on_device.quality == on_host.quality


@pytest.mark.parametrize("pass_batch", [1, 3])
def test_passes_in_several_parts_are_the_same_wherever_activations_live(
    pass_batch: int, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight sequences, or three parts of which the last is shorter, through two arrivals and two departures."""
    monkeypatch.setattr(memory, "PASS_BYTES", pass_batch * 48 * (4 * 64 + 3 * 192) * 2)
    on_device = run_job(small_model, tmp_path / "a", **ON_GPU).report
    monkeypatch.setattr(memory, "ACTIVATION_SHARE", 0.0)
    on_host = run_job(small_model, tmp_path / "b", **ON_GPU).report
    assert (on_device.plan["pass_batch"], on_host.plan["pass_batch"]) == (pass_batch, pass_batch)
    assert (on_device.plan["activations"], on_host.plan["activations"]) == ("device", "host")
    assert on_device.quality == on_host.quality
    for mine, other in zip(on_device.blocks, on_host.blocks, strict=True):
        assert mine.output_error == other.output_error


@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_tuning_is_captured_and_the_same_wherever_activations_live(
    quantized_inputs: bool, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[AttemptLine] = []
    tuned = ON_GPU | TUNED | {"quantized_inputs": quantized_inputs}
    on_device = run_job(small_model, tmp_path / "a", lines, **tuned).report
    monkeypatch.setattr(memory, "ACTIVATION_SHARE", 0.0)
    on_host = run_job(small_model, tmp_path / "b", lines, **tuned).report
    assert (on_device.plan["activations"], on_host.plan["activations"]) == ("device", "host")
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert on_device.quality == on_host.quality
    assert "capture_failed" not in {line.event for line in lines if isinstance(line, LogEvent)}


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_step_is_captured_once_for_all_blocks(
    place: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "host":
        monkeypatch.setattr(memory, "ACTIVATION_SHARE", 0.0)
    captures, capture = Counter[str](), cuda_graphs.capture

    def counted(*given: Any) -> Any:
        captures["all"] += 1
        return capture(*given)

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    run_job(small_model, tmp_path, **ON_GPU, **TUNED)
    assert captures["all"] == 2, "a step and a check"


def test_blocks_read_ahead_are_those_of_the_checkpoint(small_model: Path) -> None:
    """Through pinned memory in small pieces, while the main stream is busy."""
    device = torch.device("cuda")
    model = StreamedModel.open(Checkpoint.open(small_model), device)
    upload = Upload(device, chunk_bytes=1 << 10)
    busy = torch.randn(4096, 4096, device=device)
    for index, weights in enumerate(read_ahead(lambda i: model.read(model.layout.block(i), {}, upload), 3, device)):
        for _ in range(20):
            busy = busy @ busy / 64
        expected = model.read(model.layout.block(index))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(hand_over(weights[name]), expected[name]) for name in expected)


def test_a_gpu_and_a_cpu_round_alike(small_model: Path, tmp_path: Path) -> None:
    on_gpu = run_job(small_model, tmp_path / "a", **ON_GPU).report
    on_cpu = run_job(small_model, tmp_path / "b").report
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert on_gpu.quality is not None
    assert on_cpu.quality is not None
    assert on_gpu.quality.kl_divergence == pytest.approx(on_cpu.quality.kl_divergence, rel=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        {"method": "gptq"},
        {"method": "gptq", "act_order": False},
        {"method": "awq", "search_samples": 4},
        {"method": "omniquant", "epochs": 3, "batch_size": 2, "learning_rate": 0.03},
        {"method": "omniquant", "epochs": 3, "batch_size": 2, "learning_rate": 0.03, "aug_loss": True},
        {"method": "loftq", "base": "affine", "rank": 4},
        {"method": "apiq", "steps": 20, "rank": 4, "aug_loss": True},
        {"method": "apiq", "steps": 20, "rank": 4, "base": "signround", "freeze_base": True},
        {"method": "apiq", "steps": 20, "rank": 4, "granularity": "layer"},
    ],
    ids=str,
)
def test_a_method_gives_the_same_codes_again_and_errors_as_on_a_cpu(
    method: dict[str, Any], symmetric: bool, small_model: Path, tmp_path: Path
) -> None:
    job, lines = {"bits": 3, "symmetric": symmetric, **method}, list[AttemptLine]()
    first = run_job(small_model, tmp_path / "a", lines, **ON_GPU, **job).report
    run_job(small_model, tmp_path / "b", **ON_GPU, **job)
    on_cpu = run_job(small_model, tmp_path / "c", **job).report
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert not [line for line in lines if isinstance(line, LogEvent) and line.event == "capture_failed"]
    errors = [fmean(block.output_error or 0.0 for block in report.blocks) for report in (first, on_cpu)]
    # SignRound's steps go by signs: where one is near to call, sums in another order take two blocks apart, either way.
    near = 2.5 if method.get("base") == "signround" else 1.0
    assert errors[0] == pytest.approx(errors[1], rel=0.1 * near)
    for mine, other in zip(first.blocks, on_cpu.blocks, strict=True):
        assert mine.output_error == pytest.approx(other.output_error, rel=0.1 * near)
        for one, two in zip(mine.linears, other.linears, strict=True):
            assert one.output_error == pytest.approx(two.output_error, rel=0.15 * near)


def test_scales_are_tuned_in_one_captured_step_and_the_same_again(small_model: Path, tmp_path: Path) -> None:
    first, again = (run_job(small_model, tmp_path / name, **ON_GPU, **SCALED).report.scales for name in "ab")
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert first is not None
    assert again is not None
    assert first.captured
    assert first.kept
    assert first.kl < first.kl_initial
    assert (first.kl_initial, first.kl) == (again.kl_initial, again.kl)


def test_codes_move_in_one_captured_step_and_the_same_again(small_model: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"method": "signround", "scheme": "mxfp4a16", "steps": 12, "scale_steps": 80}
    first, again = (run_job(small_model, tmp_path / name, **ON_GPU, **request).report.scales for name in "ab")
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert first is not None
    assert first.captured
    assert first.kept
    assert first.codes
    assert again is not None
    assert (first.kl_initial, first.kl, first.codes) == (again.kl_initial, again.kl, again.codes)


def test_eager_steps_give_the_scales_of_captured_ones(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(small_model, tmp_path / "a", **ON_GPU, **SCALED)

    def refuse(*_: object) -> None:
        raise RuntimeError("no capture")

    monkeypatch.setattr(tuning, "captured", refuse)
    lines: list[AttemptLine] = []
    report = run_job(small_model, tmp_path / "b", lines, **ON_GPU, **SCALED).report
    assert report.scales is not None
    assert not report.scales.captured
    assert any(isinstance(line, LogEvent) and line.event == "capture_failed" for line in lines)
    assert differing(tmp_path / "a", tmp_path / "b") == []


def test_recomputed_blocks_gain_as_much(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [run_job(small_model, tmp_path / "a", **ON_GPU, **SCALED).report.scales]
    monkeypatch.setattr(tuning, "find_fit", lambda _: Fit(2, 3))
    found.append(run_job(small_model, tmp_path / "b", **ON_GPU, **SCALED).report.scales)
    gains = [report.kl / report.kl_initial for report in found if report is not None]
    assert len(gains) == 2
    assert max(gains) < 1
    assert gains[1] == pytest.approx(gains[0], rel=0.1)


def test_the_models_own_blocks_gain_too(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other codes come out of the blocks (roundings differ), so only the direction is the same."""
    monkeypatch.setattr(fused_blocks, "fuse", lambda block, _: block)
    report = run_job(small_model, tmp_path / "a", **ON_GPU, **SCALED).report.scales
    assert report is not None
    assert report.captured
    assert report.kl < report.kl_initial


def test_a_resumed_job_has_the_codes_of_an_undisturbed_one(small_model: Path, tmp_path: Path) -> None:
    run_job(small_model, tmp_path / "a", **ON_GPU, **TUNED)
    run_job(small_model, tmp_path / "b", **ON_GPU, **TUNED)
    state = tmp_path / "b/state/state.json"
    finished = json.loads(state.read_text())
    state.write_text(json.dumps(finished | {"blocks": finished["blocks"][:1]}))
    report = run_job(small_model, tmp_path / "b", **ON_GPU, **TUNED).report
    assert (report.blocks_resumed, report.blocks_computed) == (1, 2)
    assert differing(tmp_path / "a", tmp_path / "b") == []
