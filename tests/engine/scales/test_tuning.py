"""End-to-end scale tuning: its gradient, what it must not touch, and that it never makes a model worse."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine
from app.domain.methods import Scheme
from bitwright.events import LogEvent, ProgressEvent, Stage, WarningEvent
from tests.engine.conftest import Finished, finish, run_job
from tests.engine.model.random_models import LENGTH, PECULIARITIES, VOCABULARY, save_random_model
from workers.engine import memory
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.scales import stage as stage_module
from workers.engine.scales import tuning as tuning_module
from workers.engine.scales.memory_plan import Fit, ScaleTask, Skipped, find_fit
from workers.engine.scales.teacher_loss import OutputHead
from workers.engine.scales.tuning import ScaleOutcome, ScaleTuning, rates, tune_scales
from workers.methods.rtn import quantize_weight
from workers.numerics.affine import store_scale
from workers.numerics.quantized import AffineWeight

SAMPLES = 6
SYMMETRIC, ASYMMETRIC = (Scheme(bits=3, group_size=size, symmetric=s) for size, s in ((16, True), (-1, False)))


def rounded(model: StreamedModel, scale_dtype: torch.dtype, ignored: str = "-") -> dict[str, AffineWeight]:
    """The blocks' linears, rounded to nearest: two schemes, so that there are two families."""
    found = {}
    for name in model.linears():
        if name != model.layout.head and ignored not in name:
            scheme = ASYMMETRIC if "down_proj" in name or "q_proj" in name else SYMMETRIC
            with model.loaded(name):
                weight = model.model.get_submodule(name).weight
                found[name] = quantize_weight(weight, scheme, scale_dtype)
    return found


def make_task(
    folder: Path, architecture: str, dtype: torch.dtype = torch.float32, steps: int = 12, ignored: str = "-"
) -> ScaleTask:
    """A task on a random model whose rounded weights' scales are the only thing wrong with it."""
    whole = save_random_model(folder, architecture, dtype=dtype)
    model = StreamedModel.open(Checkpoint.open(folder), torch.device("cpu"))
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    whole.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    with torch.no_grad(), model.loaded(*model.layout.outer):
        inputs = model.embed(ids)
        whole(ids)
    weights = rounded(model, torch.float32 if dtype == torch.float64 else dtype, ignored)
    return ScaleTask(
        model=model,
        schemes={name: weight.scheme for name, weight in weights.items()},
        weights=lambda index: {n: w for n, w in weights.items() if f"layers.{index}." in n},
        calls=model.capture_calls(LENGTH),
        inputs=inputs,
        targets=seen[0],
        quantized_head=None,
        steps=steps,
        seed=5,
        micro_batch=4,
        held_bytes=0,
    )


def change_by_autograd(
    folder: Path,
    task: ScaleTask,
    changes: Mapping[str, Tensor],
    batch: Tensor,
    of_token: Callable[[Tensor], Tensor] = lambda each: each,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean KL and dL/dp of every linear, through transformers' whole model under autograd; batch of sequences.

    of_token   the loss of a token, of its KL
    """
    whole = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    leaves, values = {}, {}
    for index in range(len(task.calls)):
        for name, weight in task.weights(index).items():
            assert isinstance(weight, AffineWeight)
            p = leaves[name] = changes[name].clone().requires_grad_()
            free = weight.scale.double() * (1 + p)
            scale = free + (store_scale(free, weight.scale.dtype) - free).detach()
            zero = 4 if weight.zero_point is None else weight.zero_point.double().unsqueeze(-1)
            steps = weight.codes.double().view(*weight.scale.shape, -1) - zero
            values[f"{name}.weight"] = (steps * scale.unsqueeze(-1)).view(weight.shape)
    with torch.no_grad():
        teacher = whole(inputs_embeds=task.inputs[batch]).logits.log_softmax(-1)
    output = torch.func.functional_call(whole, values, kwargs={"inputs_embeds": task.inputs[batch]})
    loss = of_token((teacher.exp() * (teacher - output.logits.log_softmax(-1))).sum(-1)).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def begin(task: ScaleTask, fit: Fit, check: Callable[[ScaleTuning], None]) -> None:
    with task.model.loaded(*task.model.after_blocks):
        check(ScaleTuning.begin(task, fit, OutputHead.of(task.model, task.quantized_head)))


@pytest.mark.parametrize(
    ("architecture", "fit", "ignored"),
    [(name, Fit(4, 0), "-") for name in PECULIARITIES]
    + [("llama", Fit(1, 4), "-"), ("llama", Fit(3, 2), "layers.0."), ("gemma3_text", Fit(2, 3), "layers.0.")],
)
def test_the_gradient_is_autograds_through_the_whole_model(
    architecture: str, fit: Fit, ignored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.LOGITS_AT_ONCE, "cpu", 7 * VOCABULARY)
    task, batch = make_task(tmp_path, architecture, torch.float64, ignored=ignored), torch.tensor([4, 0, 3, 1])

    def check(tuning: ScaleTuning) -> None:
        scales = tuning.blocks.scales
        scales.change.copy_(0.02 * torch.randn(scales.change.shape, generator=torch.Generator().manual_seed(2)))
        scales.write()
        changes = {n: scales.change[p.overall].view(p.shape[0], -1) for n, p in scales.places.items()}
        loss, expected = change_by_autograd(tmp_path, task, changes, batch)
        found = tuning.gradient(batch)
        largest = float(max(gradient.abs().max() for gradient in expected.values()))
        assert largest > 1e-5
        for name, place in scales.places.items():
            torch.testing.assert_close(
                found[place.overall].view_as(expected[name]), expected[name], rtol=1e-5, atol=1e-5 * largest
            )
        tuning.held_out = batch
        assert tuning.held_out_divergence() == pytest.approx(float(loss), rel=1e-6)

    begin(task, fit, check)


@pytest.mark.parametrize("architecture", PECULIARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_gains(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    task = make_task(tmp_path, architecture, dtype)
    outcome = tune_scales(task)
    assert isinstance(outcome, ScaleOutcome)
    assert outcome.is_better
    assert outcome.scales.keys() == task.schemes.keys()
    old = {n: w.scale for index in range(4) for n, w in task.weights(index).items()}
    assert {scale.dtype for scale in outcome.scales.values()} == {dtype}
    assert any(not torch.equal(outcome.scales[name], old[name]) for name in old)
    ratio = torch.cat([(outcome.scales[n].double() / s.double()).flatten() for n, s in old.items()])
    assert 0.9 < ratio.min() <= ratio.max() < 1.1
    assert {p.device.type for p in task.model.model.parameters()} == {"meta"}
    again = tune_scales(task)
    assert isinstance(again, ScaleOutcome)
    assert all(torch.equal(again.scales[name], outcome.scales[name]) for name in old)


def test_no_step_changes_nothing(tmp_path: Path) -> None:
    task = make_task(tmp_path, "llama", torch.bfloat16, steps=0)
    outcome = tune_scales(task)
    assert isinstance(outcome, ScaleOutcome)
    assert outcome.divergence == outcome.divergence_initial
    assert not outcome.is_better
    for index in range(4):
        for name, weight in task.weights(index).items():
            assert torch.equal(outcome.scales[name], weight.scale)


def test_micro_batches_and_recomputing_change_little(tmp_path: Path) -> None:
    task = make_task(tmp_path, "qwen2", torch.float64)
    found: list[Tensor] = []

    def run(tuning: ScaleTuning) -> None:
        tuning.run()
        found.append(tuning.blocks.scales.change.clone())

    for fit in (Fit(4, 0), Fit(1, 4)):
        begin(task, fit, run)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert found[0].abs().max() > 1e-3


def test_rates_rise_and_fall() -> None:
    found = rates(100)
    assert found[0] == pytest.approx(2e-4)
    assert int(found.argmax()) == 9
    assert found[9] == pytest.approx(2e-3 * 0.91)
    assert found[-1] == pytest.approx(2e-5)
    assert len(rates(0)) == 0


def test_memory_decides_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.LOGITS_AT_ONCE, "cpu", 0)
    task = make_task(tmp_path, "llama")

    def fit_of(size: float, held: int = 0) -> Fit | Skipped:
        monkeypatch.setattr(memory, "host_memory", lambda: size / memory.SCALES_SHARE["cpu"])
        return find_fit(replace(task, held_bytes=held))

    found = [fit_of(2.0**exponent) for exponent in (10, 20, 20.5, 21, 22, 23, 24, 30)]
    assert isinstance(found[0], Skipped)
    assert "GB" in found[0].reason
    fits = [fit for fit in found if isinstance(fit, Fit)]
    assert fits[-1] == Fit(4, 0)
    order = [(fit.micro_batch, -fit.recomputed) for fit in fits]
    assert order == sorted(order)
    assert len(set(order)) > 2
    assert isinstance(fit_of(2.0**30, held=2**30), Skipped)


def test_running_out_of_memory_takes_less_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    task = replace(make_task(tmp_path, "llama"), log=lambda _, **fields: logged.append(fields))
    original, fails = ScaleTuning.gradient, [True, True, True, False]

    def gradient(self: ScaleTuning, batch: Tensor) -> Tensor:
        if fails[0]:
            fails.pop(0)
            raise torch.OutOfMemoryError
        return original(self, batch)

    monkeypatch.setattr(ScaleTuning, "gradient", gradient)
    outcome = tune_scales(task)
    assert isinstance(outcome, ScaleOutcome)
    assert outcome.fit == Fit(1, 4)
    assert [tuple(fields.values()) for fields in logged] == [(4, 4), (2, 4), (1, 4)]
    fails[:] = [True] * 9
    assert isinstance(tune_scales(task), Skipped)


def test_without_a_quantized_linear_there_is_nothing_to_tune(tmp_path: Path) -> None:
    assert isinstance(tune_scales(replace(make_task(tmp_path, "llama"), schemes={})), Skipped)


TUNED: dict[str, Any] = {
    "method": "signround",
    "bits": 4,
    "symmetric": False,
    "steps": 6,
    "batch_size": 4,
    "calibration": {"num_samples": 24, "sequence_length": 32},
}
SCALED: dict[str, Any] = TUNED | {"scale_steps": 20}


@pytest.fixture(scope="module")
def plain(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job that leaves scales as they are."""
    return finish(small_model, tmp_path_factory.mktemp("plain"), **TUNED)


@pytest.fixture(scope="module")
def scaled(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same job with scales tuned, undisturbed."""
    return finish(small_model, tmp_path_factory.mktemp("scaled"), **SCALED)


def stored(workspace: Path) -> dict[str, Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


def warnings(lines: list[AttemptLine]) -> set[str]:
    """Codes; that a test's text is short is no news."""
    return {line.code for line in lines if isinstance(line, WarningEvent)} - {"starved_calibration"}


def assert_same(first: Path, second: Path) -> None:
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_job_tunes_scales_and_nothing_else(plain: Finished, scaled: Finished) -> None:
    before, after = stored(plain.workspace), stored(scaled.workspace)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"scale"}
    assert {name.split(".")[2] for name in changed} == {"0", "1", "2"}
    report = scaled.report
    assert plain.report.scales is None
    assert report.scales is not None
    assert report.scales.kept
    assert report.scales.kl < report.scales.kl_initial
    assert (report.scales.steps, report.scales.held_out) == (20, 3)
    assert report.quality is not None
    assert plain.report.quality is not None
    assert report.quality.kl_divergence != plain.report.quality.kl_divergence
    assert report.quality.perplexity_original == plain.report.quality.perplexity_original
    assert sum(s for stage, s in report.seconds.items() if stage != "total") == pytest.approx(report.seconds["total"])
    assert report.seconds["scales"] == pytest.approx(report.scales.seconds, rel=0.2, abs=0.1)
    progress = [line for line in scaled.lines if isinstance(line, ProgressEvent)]
    assert list(dict.fromkeys(line.stage for line in progress))[1:3] == [Stage.QUANTIZE, Stage.SCALES]
    assert [line.done for line in progress if line.stage is Stage.SCALES][-1] == 20
    assert warnings(scaled.lines) == set()


def test_the_quality_is_that_of_the_written_checkpoint(small_model: Path, scaled: Finished) -> None:
    from app.domain.request.job_request import Evaluation
    from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

    ids = evaluation_sequences(
        load_tokenizer(small_model), Evaluation(num_samples=4, sequence_length=48), None, 0, None
    ).ids
    logs = []
    for path in (small_model, scaled.workspace / scaled.result.checkpoints["compressed-tensors"]):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(ids).logits[:, :-1]
        logs.append(logits.float().log_softmax(-1))
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert scaled.report.quality is not None
    # At 4 bits the products of bf16 round as much as a hundredth of it.
    assert scaled.report.quality.kl_divergence == pytest.approx(float(divergence), rel=1e-2, abs=1e-5)


def test_the_same_request_gives_the_same_scales(small_model: Path, scaled: Finished, tmp_path: Path) -> None:
    run_job(small_model, tmp_path, **SCALED)
    assert_same(scaled.workspace, tmp_path)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", ["in the middle", "before it is durable", "after it is durable"])
def test_a_resumed_job_has_the_scales_of_an_undisturbed_one(
    moment: str, small_model: Path, scaled: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted

    places = {
        "in the middle": "workers.engine.scales.tuning.ScaleTuning.step",
        "before it is durable": "workers.engine.finished_blocks.FinishedBlocks.save_scales",
        "after it is durable": "workers.engine.evaluate.measure",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[moment], interrupt)
        with pytest.raises(Interrupted):
            run_job(small_model, tmp_path, **SCALED)
    if moment == "after it is durable":
        monkeypatch.setattr(stage_module, "tune_scales", interrupt)
    resumed, whole = run_job(small_model, tmp_path, **SCALED).report, scaled.report
    assert_same(scaled.workspace, tmp_path)
    assert (resumed.blocks_computed, resumed.blocks_resumed) == (0, 3)
    assert resumed.quality == whole.quality
    assert resumed.scales is not None
    assert whole.scales is not None
    assert resumed.scales.model_copy(update={"seconds": 0}) == whole.scales.model_copy(update={"seconds": 0})


@pytest.mark.parametrize("damaged", ["scales.safetensors", "block-00001.safetensors"])
def test_damaged_scales_are_tuned_anew(damaged: str, small_model: Path, scaled: Finished, tmp_path: Path) -> None:
    shutil.copytree(scaled.workspace, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "state" / damaged
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    lines: list[AttemptLine] = []
    run_job(small_model, tmp_path, lines, **SCALED)
    assert any(isinstance(line, ProgressEvent) and line.stage is Stage.SCALES for line in lines)
    assert_same(scaled.workspace, tmp_path)


def test_scales_that_are_no_better_are_not_kept(
    small_model: Path, plain: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_module, "LEARNING_RATE", 3.0)
    for _ in range(2):  # the second run takes the verdict over
        lines: list[AttemptLine] = []
        report = run_job(small_model, tmp_path, lines, **SCALED).report
        assert warnings(lines) == {"scale_tuning_rejected"}
        assert_same(plain.workspace, tmp_path)
        assert report.scales is not None
        assert not report.scales.kept
        assert report.scales.kl == report.scales.kl_initial
        assert report.quality == plain.report.quality
    assert report.blocks_resumed == 3


def test_a_model_that_does_not_fit_keeps_its_scales(
    small_model: Path, plain: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 20)
    lines: list[AttemptLine] = []
    report = run_job(small_model, tmp_path, lines, **SCALED).report
    assert_same(plain.workspace, tmp_path)
    assert report.scales is None
    assert report.quality == plain.report.quality
    assert warnings(lines) == {"scale_tuning_skipped"}
    (warning,) = [line for line in lines if isinstance(line, WarningEvent) and line.code == "scale_tuning_skipped"]
    assert "GB" in warning.message
    assert not any(isinstance(line, LogEvent) and line.event == "capture_failed" for line in lines)


def test_blocks_learn_to_live_with_a_rounded_head(small_model: Path, tmp_path: Path) -> None:
    modules = {"ignore": ["model.layers.0.*"]}
    report = run_job(small_model, tmp_path, modules=modules, **SCALED).report
    assert report.scales is not None
    assert report.scales.kept
    head_alone = {"ignore": ["model.layers.*"]}
    lines: list[AttemptLine] = []
    assert run_job(small_model, tmp_path / "head", lines, modules=head_alone, **SCALED).report.scales is None
    assert "scale_tuning_skipped" in warnings(lines)
