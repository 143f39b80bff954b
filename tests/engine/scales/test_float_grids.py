"""End-to-end tuning on floating-point grids: scales that can move, norms along with them, and what ships."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine
from app.domain.methods import Scheme
from app.domain.methods.named_schemes import SchemeName
from bitwright.events import WarningEvent
from tests.engine.conftest import Finished, finish, run_job
from tests.engine.scales.test_tuning import begin, make_task
from workers.engine.scales import stage as stage_module
from workers.engine.scales import tuning as tuning_module
from workers.engine.scales.memory_plan import Fit, ScaleTask
from workers.engine.scales.tuning import ScaleOutcome, ScaleTuning, tune_scales
from workers.formats.load_bitwright import load_weights
from workers.numerics.floats import float_grids
from workers.numerics.floats.input_rounding import input_roundings
from workers.numerics.quantized import AffineWeight, FloatWeight

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NVFP4, MXFP4, FP8 = (Scheme.named(SchemeName(name)) for name in ("nvfp4a16", "mxfp4a16", "fp8a16"))
BY_LINEAR = {"q_proj": FP8, "up_proj": MXFP4, "o_proj": MXFP4}
GRADIENT_AT = ("llama", "qwen3", "gemma3_text")


def float_task(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **changed: Any) -> ScaleTask:
    """A task on a random model whose linears are NVFP4, FP8 and MXFP4 by name, and integers in the last block."""
    task = make_task(folder, architecture, dtype)
    integers = dict(task.weights(3))
    weights: dict[str, AffineWeight | FloatWeight] = {}
    for name in task.schemes:
        with task.model.loaded(name):
            scheme = BY_LINEAR.get(name.rpartition(".")[2], NVFP4)
            weight = task.model.model.get_submodule(name).weight
            scale_dtype = torch.float32 if dtype == torch.float64 else dtype
            weights[name] = float_grids.quantize(weight, scheme, scale_dtype)
    weights |= {n: each for n, each in integers.items() if "down_proj" in n and isinstance(each, AffineWeight)}
    return replace(
        task,
        schemes={name: weight.scheme for name, weight in weights.items()},
        weights=lambda index: {n: w for n, w in weights.items() if f"layers.{index}." in n},
        norms=True,
        **changed,
    )


def straight_through(free: Tensor, rounded: Tensor) -> Tensor:
    return free + (rounded - free).detach()


def values_of(weight: FloatWeight) -> Tensor:
    """L of every code, fp64 (out, in), from the formats' definitions."""
    if weight.scheme.bits == 8:
        return weight.codes.view(torch.float8_e4m3fn).double()
    table = torch.tensor(E2M1 + [-value for value in E2M1], dtype=torch.float64)
    return table[weight.codes.long()]


def by_hand(weight: AffineWeight | FloatWeight, p: Tensor) -> Tensor:
    """The weight of a change p of its scales, (out, groups), in fp64."""
    if isinstance(weight, AffineWeight):
        assert weight.zero_point is not None
        free = weight.scale.double() * (1 + p)
        steps = weight.codes.double().view(*p.shape, -1) - weight.zero_point.double().unsqueeze(-1)
        return (steps * straight_through(free, free.float().double()).unsqueeze(-1)).view(weight.shape)
    levels = values_of(weight).view(*weight.scale.shape, -1)
    if weight.scheme == MXFP4:
        return (levels * torch.exp2(weight.scale.double() - 127).unsqueeze(-1)).view(weight.shape)
    if weight.scheme == FP8:
        free = weight.scale.double() * (1 + p)
        return (levels * straight_through(free, free.float().double()).unsqueeze(-1)).view(weight.shape)
    assert weight.global_scale is not None
    free = weight.scale.double() * (1 + 2 * p)
    stored = free.float().clamp(2.0**-9, 448).to(torch.float8_e4m3fn).double()
    return (levels * (straight_through(free, stored) / weight.global_scale.double()).unsqueeze(-1)).view(weight.shape)


def gradients_by_autograd(
    folder: Path, task: ScaleTask, changes: Mapping[str, Tensor], batch: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean KL and dL/dp of linears' scales and norms, through transformers' whole model under autograd."""
    whole = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    parameters = dict(whole.named_parameters())
    offset = 1.0 if "gemma" in whole.config.model_type else 0.0
    leaves = {name: change.clone().requires_grad_() for name, change in changes.items()}
    values = {}
    for index in range(len(task.calls)):
        for name, weight in task.weights(index).items():
            assert isinstance(weight, AffineWeight | FloatWeight)
            p = leaves.get(name, torch.zeros(weight.scale.shape, dtype=torch.float64))
            values[f"{name}.weight"] = by_hand(weight, p)
    for name in changes.keys() & parameters.keys():
        values[name] = (offset + parameters[name]) * (1 + leaves[name]) - offset
    with torch.no_grad():
        teacher = whole(inputs_embeds=task.inputs[batch]).logits.log_softmax(-1)
    output = torch.func.functional_call(whole, values, kwargs={"inputs_embeds": task.inputs[batch]})
    loss = (teacher.exp() * (teacher - output.logits.log_softmax(-1))).sum(-1).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize(("architecture", "fit"), [(name, Fit(4, 0)) for name in GRADIENT_AT] + [("llama", Fit(1, 4))])
def test_the_gradient_is_autograds_through_the_whole_model(architecture: str, fit: Fit, tmp_path: Path) -> None:
    task, batch = float_task(tmp_path, architecture, torch.float64), torch.tensor([4, 0, 3, 1])
    parts = 4 if architecture == "gemma3_text" else 2

    def check(tuning: ScaleTuning) -> None:
        scales = tuning.blocks.scales
        scales.change.copy_(0.02 * torch.randn(scales.change.shape, generator=torch.Generator().manual_seed(2)))
        scales.write()
        flat = {
            name: place.overall for name, place in scales.places.items() if place.overall.stop > place.overall.start
        }
        assert {name.rpartition(".")[2] for name in scales.places.keys() - flat.keys()} == {"up_proj", "o_proj"}
        first = len(scales.change) - len(scales.norms.names) * 32
        assert len(scales.norms.names) == 4 * parts
        for number, (_, prefix, name) in enumerate(scales.norms.names):
            flat[f"{prefix}.{name}.weight"] = slice(first + 32 * number, first + 32 * (number + 1))
        changes = {name: scales.change[own] for name, own in flat.items()}
        for name in scales.places.keys() & changes.keys():
            changes[name] = changes[name].view(scales.places[name].shape[0], -1)
        loss, expected = gradients_by_autograd(tmp_path, task, changes, batch)
        found = tuning.gradient(batch)
        largest = float(max(gradient.abs().max() for gradient in expected.values()))
        assert largest > 1e-5
        for name, own in flat.items():
            torch.testing.assert_close(
                found[own].view_as(expected[name]), expected[name], rtol=1e-5, atol=1e-5 * largest
            )
        tuning.held_out = batch
        assert tuning.held_out_divergence() == pytest.approx(float(loss), rel=1e-6)

    begin(task, fit, check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    task = float_task(tmp_path, "gemma3_text", dtype, steps=0)
    outcome = tune_scales(task)
    assert isinstance(outcome, ScaleOutcome)
    assert not outcome.is_better
    found = {n: w for index in range(4) for n, w in task.weights(index).items()}
    assert outcome.scales.keys() == {name for name, weight in found.items() if weight.scheme != MXFP4}
    for name, scale in outcome.scales.items():
        assert scale.dtype == found[name].scale.dtype
        assert torch.equal(scale.float(), found[name].scale.float())
    for norms in outcome.norms.values():
        for name, weight in norms.items():
            assert torch.equal(weight, task.model.checkpoint.read(task.model.sources[name]))

    def check(tuning: ScaleTuning) -> None:
        for name, place in tuning.blocks.scales.places.items():
            value = tuning.blocks.scales.families[place.family].value[place.groups].view(place.shape)
            assert torch.equal(value, found[name].dequantize())

    begin(task, Fit(4, 0), check)


def test_the_judge_computes_with_rounded_inputs_where_a_server_does(tmp_path: Path) -> None:
    """FP8 with a scale per token, by transformers' forward pass with inputs cast by hand."""
    task = make_task(tmp_path, "llama")
    scheme, weights = Scheme.named(SchemeName.FP8), dict[str, FloatWeight]()
    for name in task.schemes:
        with task.model.loaded(name):
            weights[name] = float_grids.quantize(task.model.model.get_submodule(name).weight, scheme, torch.float32)

    def roundings(index: int) -> Any:
        prefix = f"model.layers.{index}."
        return input_roundings({n.removeprefix(prefix): scheme for n in weights if n.startswith(prefix)}, {})

    task = replace(
        task,
        schemes=dict.fromkeys(weights, scheme),
        weights=lambda index: {n: w for n, w in weights.items() if f"layers.{index}." in n},
        roundings=roundings,
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)

    def cast(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = given[0].abs().amax(-1, keepdim=True) / 448
        return ((given[0] / scale).to(torch.float8_e4m3fn).float() * scale,)

    with torch.no_grad():
        teacher = whole(inputs_embeds=task.inputs).logits.log_softmax(-1)
        for name, weight in weights.items():
            linear = whole.get_submodule(name)
            linear.weight.copy_(weight.dequantize())
            linear.register_forward_pre_hook(cast)
        student = whole(inputs_embeds=task.inputs).logits.log_softmax(-1)
    expected = float((teacher.exp() * (teacher - student)).sum(-1).mean())

    def check(tuning: ScaleTuning) -> None:
        tuning.held_out = torch.arange(len(task.inputs))
        assert tuning.held_out_divergence() == pytest.approx(expected, rel=1e-2)
        assert tuning.gradient(torch.arange(4)).abs().max() > 0

    begin(task, Fit(4, 0), check)


def stored(workspace: Path) -> dict[str, Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def assert_same(first: Path, second: Path) -> None:
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    assert all(same(one[name], other[name]) for name in one)


LONG: dict[str, Any] = {
    "method": "signround",
    "steps": 30,
    "scale_steps": 60,
    "calibration": {"num_samples": 64, "sequence_length": 64},
    "evaluation": {"num_samples": 32, "sequence_length": 64},
    "formats": ["compressed-tensors"],
}


@pytest.fixture(scope="module", params=["nvfp4a16", pytest.param("mxfp4a16", marks=pytest.mark.slow)])
def jobs(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Finished, Finished]:
    """A scheme, a job without the stage and one with it, of a trained model."""
    scheme = request.param
    plain = finish(tiny_model, tmp_path_factory.mktemp("plain"), scheme=scheme, **(LONG | {"scale_steps": 0}))
    return scheme, plain, finish(tiny_model, tmp_path_factory.mktemp("tuned"), scheme=scheme, **LONG)


def test_held_out_text_and_other_text_are_closer_by_it(jobs: tuple[str, Finished, Finished]) -> None:
    scheme, plain, tuned = jobs
    report = tuned.report
    assert report.scales is not None
    assert report.scales.kept
    assert report.scales.kl < (0.97 if scheme == "nvfp4a16" else 0.98) * report.scales.kl_initial
    assert report.quality is not None
    assert plain.report.quality is not None
    assert report.quality.kl_divergence < plain.report.quality.kl_divergence


def test_codes_norms_and_scales_that_are_no_powers_of_two_change_and_nothing_else(
    jobs: tuple[str, Finished, Finished],
) -> None:
    scheme, plain, tuned = jobs
    before, after = stored(plain.workspace), stored(tuned.workspace)
    changed = {name for name in before if not same(before[name], after[name])}
    scales = {name for name in changed if name.endswith("_proj.scale")}
    norms = {name for name in changed if name.endswith("layernorm.weight")}
    codes = {name for name in changed if name.endswith("_proj.codes")}
    assert changed == scales | norms | codes
    assert len(codes) == (0 if scheme == "nvfp4a16" else 14)
    assert bool(scales) is (scheme == "nvfp4a16")
    assert len(norms) == 4
    assert all(after[name].dtype == torch.bfloat16 for name in norms)
    assert tuned.report.scales is not None
    assert tuned.report.scales.norms == 4
    card = (tuned.workspace / "output/compressed-tensors/README.md").read_text()
    along = " and 4 norms" if scheme == "nvfp4a16" else ", 4 norms and codes"
    assert f"- Scales{along} tuned end to end in 60 steps" in card


def test_what_ships_is_what_was_measured(jobs: tuple[str, Finished, Finished], tiny_model: Path) -> None:
    from app.domain.request.job_request import Evaluation
    from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

    _, _, tuned = jobs
    output = tuned.workspace / "output"
    weights, others = load_weights(output / "native"), load_weights(output / "compressed-tensors")
    assert weights.keys() == others.keys()
    assert all(same(weights[name], others[name]) for name in weights)
    ids = evaluation_sequences(load_tokenizer(tiny_model), Evaluation(**LONG["evaluation"]), None, 0, None).ids
    whole, logs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), []
    for given in (None, weights):
        if given is not None:
            whole.load_state_dict(given, strict=False)
        with torch.no_grad():
            logs.append(whole(ids).logits[:, :-1].float().log_softmax(-1))
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert tuned.report.quality is not None
    assert tuned.report.quality.kl_divergence == pytest.approx(divergence, rel=3e-2)


SMALL: dict[str, Any] = {
    "method": "signround",
    "scheme": "nvfp4",
    "steps": 4,
    "batch_size": 4,
    "scale_steps": 12,
    "calibration": {"num_samples": 24, "sequence_length": 32},
    "formats": ["native"],
}


@pytest.fixture(scope="module")
def undisturbed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job whose activations are rounded, too."""
    return finish(small_model, tmp_path_factory.mktemp("undisturbed"), **SMALL)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", [pytest.param("in the middle", marks=pytest.mark.slow), "after it is durable"])
def test_a_resumed_job_has_the_scales_and_norms_of_an_undisturbed_one(
    moment: str, small_model: Path, undisturbed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted

    place = {
        "in the middle": "workers.engine.scales.tuning.ScaleTuning.step",
        "after it is durable": "workers.engine.evaluate.measure",
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        with pytest.raises(Interrupted):
            run_job(small_model, tmp_path, **SMALL)
    if moment == "after it is durable":
        monkeypatch.setattr(stage_module, "tune_scales", interrupt)
    report = run_job(small_model, tmp_path, **SMALL).report
    assert undisturbed.report.scales is not None
    assert undisturbed.report.scales.kept
    assert (report.blocks_computed, report.blocks_resumed) == (0, 3)
    assert report.quality == undisturbed.report.quality
    assert_same(undisturbed.workspace, tmp_path)


def test_what_is_no_better_is_not_kept(
    small_model: Path, undisturbed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finish(small_model, tmp_path / "plain", **(SMALL | {"scale_steps": 0}))
    monkeypatch.setattr(tuning_module, "LEARNING_RATE", 3.0)
    lines: list[AttemptLine] = []
    report = run_job(small_model, tmp_path / "worse", lines, **SMALL).report
    assert "scale_tuning_rejected" in {line.code for line in lines if isinstance(line, WarningEvent)}
    assert report.scales is not None
    assert not report.scales.kept
    assert report.quality == plain.report.quality
    assert_same(plain.workspace, tmp_path / "worse")
    assert not all(
        same(tensor, stored(undisturbed.workspace)[name]) for name, tensor in stored(plain.workspace).items()
    )
