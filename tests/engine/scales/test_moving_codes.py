"""Codes that move end to end: where they start, their gradient, Adam's steps, what is stored, and what does not fit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from app.domain.methods.named_schemes import SchemeName
from bitwright.events import WarningEvent
from tests.engine.conftest import Finished, finish, run_job
from tests.engine.scales.test_float_grids import E2M1, FP8, MXFP4, by_hand, float_task, values_of
from tests.engine.scales.test_tuning import begin, make_task
from workers.engine import memory
from workers.engine.scales import moving_codes as moving_codes_module
from workers.engine.scales import stage as stage_module
from workers.engine.scales.families import IntegerFamily
from workers.engine.scales.memory_plan import Fit, ScaleTask, Skipped, find_fit
from workers.engine.scales.moving_codes import FloatAxis, IntegerAxis, MovingCodes
from workers.engine.scales.tuning import ScaleOutcome, ScaleTuning, tune_scales
from workers.numerics.floats.elements import element_of, element_table
from workers.numerics.quantized import AffineWeight, FloatWeight

MOVING = Fit(4, 0, codes=True)
FAST = 8.0
"""A pace at which codes change in a few steps."""


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    """Codes move fast, and those of NVFP4, too, whose scales are tuned along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_codes_module, "PACE_CODES", FAST)
        patch.setattr(moving_codes_module, "MOVED", moving_codes_module.MOVED | {SchemeName.NVFP4, SchemeName.NVFP4A16})
        yield


def moving_codes(groups: int, width: int, dtype: torch.dtype) -> MovingCodes:
    axis = FloatAxis(element_of(MXFP4), element_table(MXFP4, torch.device("cpu")))
    return MovingCodes(groups, axis, torch.zeros(groups, width, dtype=dtype))


def indices_of(codes: Tensor) -> Tensor:
    """Signed index of every FP4 code: sign in the fourth bit."""
    return torch.where(codes >= 8, -(codes.int() - 8), codes.int())


def test_places_start_where_the_original_lies_within_the_box_of_its_code() -> None:
    moving = moving_codes(4, 32, torch.float64)
    generator = torch.Generator().manual_seed(0)
    scaled = 3 * torch.randn(4, 32, generator=generator, dtype=torch.float64)
    # Beyond 6 the last line goes on: 2 a step.
    line = numpy.interp(scaled.abs().numpy(), [*E2M1, 26.0], [*range(8), 17.0])
    expected = torch.from_numpy(numpy.copysign(line, scaled.numpy()))
    noise = 0.5 * torch.randn(4, 32, generator=generator, dtype=torch.float64)
    index = (expected + noise).round().clamp(-7, 7)
    codes = torch.where(index < 0, 8 - index, index).to(torch.uint8)
    moving.put(slice(0, 4), codes, scaled)
    within = (expected - index).abs() < 0.49
    assert 10 < int(within.sum()) < 100
    torch.testing.assert_close(moving.place[within], expected[within])
    torch.testing.assert_close((moving.place - index).abs()[~within], torch.full_like(index, 0.49)[~within])
    assert torch.equal(indices_of(moving.codes(slice(0, 4))), indices_of(codes))
    table = torch.tensor(E2M1 + [-value for value in E2M1], dtype=torch.float64)
    assert torch.equal(moving.values(slice(0, 4)), table[codes.int()])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_places_move_as_by_adam_of_the_library(dtype: torch.dtype, rtol: float) -> None:
    moving, generator = moving_codes(3, 16, dtype), torch.Generator().manual_seed(1)
    start = moving.place.uniform_(-6.9, 6.9, generator=generator).clone()
    leaf = start.double().clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=1.0, betas=(0.9, 0.95), eps=1e-12)
    for step in range(1, 7):
        gradient = torch.randn(3, 16, generator=generator).to(dtype)
        moving.gradient.zero_()
        moving.receive(slice(0, 3), gradient / 2)
        moving.receive(slice(0, 3), gradient / 2)
        unbiased = torch.tensor(1 - 0.9**step), torch.tensor(1 - 0.95**step)
        moving.move(torch.tensor(0.01 / FAST), unbiased, (0.9, 0.95))
        leaf.grad = gradient.double()
        adam.param_groups[0]["lr"] = 0.01
        adam.step()
    found, expected = (place.detach().double() - start.double() for place in (moving.place, leaf))
    assert expected.abs().max() > 0.03
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * 0.2)


def test_codes_of_fp4_go_slower_in_more_steps() -> None:
    moved = {}
    for axis in (FloatAxis(element_of(MXFP4), element_table(MXFP4, torch.device("cpu"))), IntegerAxis(2)):
        for steps in (100, 400, 500, 1600):
            moving, one = MovingCodes(1, axis, torch.zeros(1, 16)), torch.tensor(1.0)
            moving.spread(steps)
            moving.gradient.fill_(-1.0)
            moving.move(torch.tensor(0.01 / FAST), (one / 10, one / 20), (0.9, 0.95))
            moved[type(axis), steps] = float(moving.place[0, 0])
    assert moved[FloatAxis, 100] == moved[FloatAxis, 400] == moved[IntegerAxis, 1600] == pytest.approx(0.01)
    assert moved[FloatAxis, 500] == pytest.approx(0.008)
    assert moved[FloatAxis, 1600] == pytest.approx(0.005)


def test_no_place_leaves_the_grid_and_what_is_not_finite_moves_nothing() -> None:
    moving = moving_codes(1, 16, torch.float32)
    moving.put(slice(0, 1), torch.tensor([[7, 15, 0, 8] * 4], dtype=torch.uint8), torch.zeros(1, 16))
    before = moving.place.clone()
    one = torch.tensor(1.0)
    moving.gradient.copy_(torch.tensor([[-1.0, 1.0, torch.nan, torch.inf] * 4]))
    for _ in range(9):
        moving.move(one, (one, one), (0.9, 0.95))
    assert torch.equal(moving.place[:, 2:4], before[:, 2:4])
    assert set(moving.values(slice(0, 1)).flatten().tolist()) == {6.0, -6.0, 0.0}
    assert moving.codes(slice(0, 1)).flatten().tolist() == [7, 15, 0, 0] * 4
    assert moving.place.abs().max() < 7.5


def gradients_by_autograd(
    folder: Path, task: ScaleTask, held: dict[str, tuple[Tensor, Tensor]], batch: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """dL/dw_hat and dL/dp of linears of (codes, p), through transformers' whole model under autograd."""
    whole = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    leaves, values = {}, {}
    for index in range(len(task.calls)):
        for name, weight in task.weights(index).items():
            assert isinstance(weight, AffineWeight | FloatWeight)
            codes, p = held.get(name, (weight.codes, torch.zeros(weight.scale.shape, dtype=torch.float64)))
            moved = replace(weight, codes=codes)
            leaf = torch.zeros(weight.shape, dtype=torch.float64).requires_grad_(), p.clone().requires_grad_()
            values[f"{name}.weight"] = by_hand(moved, leaf[1]) + leaf[0]
            if name in held:
                leaves[name] = leaf
    with torch.no_grad():
        teacher = whole(inputs_embeds=task.inputs[batch]).logits.log_softmax(-1)
    output = torch.func.functional_call(whole, values, kwargs={"inputs_embeds": task.inputs[batch]})
    (teacher.exp() * (teacher - output.logits.log_softmax(-1))).sum(-1).sum().backward()
    return {name: (leaf.grad, p.grad) for name, (leaf, p) in leaves.items()}  # type: ignore[misc]


@pytest.mark.parametrize("fit", [MOVING, Fit(1, 4, codes=True)])
def test_the_gradient_of_moved_codes_is_autograds_through_the_whole_model(fit: Fit, tmp_path: Path) -> None:
    task, batch = float_task(tmp_path, "llama", torch.float64, codes=True), torch.tensor([4, 0, 3, 1])
    tokens = len(batch) * task.inputs.shape[1]

    def check(tuning: ScaleTuning) -> None:
        scales, generator = tuning.blocks.scales, torch.Generator().manual_seed(2)
        for moving in scales.moving:
            moving.place.add_(torch.randn(moving.place.shape, generator=generator)).clamp_(-7.4, 7.4)
        codes, held = scales.codes(), {}
        for name in codes:
            own = scales.change[scales.places[name].overall]
            own.copy_(0.02 * torch.randn(own.shape, generator=generator))
        scales.write()
        assert {task.schemes[name] for name in scales.places.keys() - codes.keys()} == {FP8}
        assert _down(task) in codes
        for name in codes:
            own = scales.change[scales.places[name].overall]
            p = own.view(scales.places[name].shape[0], -1) if len(own) else torch.zeros(1, dtype=torch.float64)
            held[name] = codes[name], p
        found_p = tuning.gradient(batch)
        expected = gradients_by_autograd(tmp_path, task, held, batch)
        largest = max(float(by_weight.abs().max()) for by_weight, _ in expected.values())
        assert largest > 1e-3
        for name, (by_weight, by_change) in expected.items():
            place = scales.places[name]
            codes_of = scales.families[place.family].codes
            assert codes_of is not None
            found = codes_of.gradient[place.groups].view(place.shape)
            torch.testing.assert_close(found, by_weight, rtol=1e-5, atol=1e-6 * largest)
            if place.overall.stop > place.overall.start:
                torch.testing.assert_close(
                    found_p[place.overall].view_as(by_change),
                    by_change / tokens,
                    rtol=1e-5,
                    atol=1e-5 * largest / tokens,
                )

    begin(task, fit, check)


def _down(task: ScaleTask) -> str:
    return next(name for name in task.schemes if name.endswith("3.mlp.down_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_changes_no_code(dtype: torch.dtype, tmp_path: Path) -> None:
    task = float_task(tmp_path, "gemma3_text", dtype, steps=0, codes=True)
    outcome = tune_scales(task)
    assert isinstance(outcome, ScaleOutcome)
    assert outcome.fit.codes
    assert not outcome.is_better
    assert outcome.changed == 0
    found = {n: w for index in range(4) for n, w in task.weights(index).items()}
    assert outcome.codes.keys() == {name for name, weight in found.items() if weight.scheme != FP8}

    def check(tuning: ScaleTuning) -> None:
        for name, place in tuning.blocks.scales.places.items():
            value = tuning.blocks.scales.families[place.family].value[place.groups].view(place.shape)
            assert torch.equal(value, found[name].dequantize())

    begin(task, MOVING, check)


def test_the_weights_that_were_judged_are_those_of_the_result_and_come_again(
    tmp_path: Path,
) -> None:
    task = float_task(tmp_path, "llama", torch.bfloat16, steps=20, codes=True)
    outcome = tune_scales(task)
    assert isinstance(outcome, ScaleOutcome)
    assert outcome.is_better
    before = {n: w for index in range(4) for n, w in task.weights(index).items()}
    after: dict[str, Any] = {
        name: replace(weight, codes=outcome.codes.get(name, weight.codes), scale=outcome.scales.get(name, weight.scale))
        for name, weight in before.items()
    }
    moved = [
        values_of(after[n]) != values_of(w) if isinstance(w, FloatWeight) else after[n].codes != w.codes
        for n, w in before.items()
    ]
    assert 0 < outcome.changed == sum(int(each.sum()) for each in moved)

    def check(tuning: ScaleTuning) -> None:
        tuning.run()
        assert tuning.held_out_divergence() == outcome.divergence
        for name, place in tuning.blocks.scales.places.items():
            value = tuning.blocks.scales.families[place.family].value[place.groups].view(place.shape)
            assert torch.equal(value, after[name].dequantize())

    begin(task, outcome.fit, check)


def test_codes_stay_where_they_find_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.LOGITS_AT_ONCE, "cpu", 0)
    task = float_task(tmp_path, "llama", codes=True)

    def fit_of(size: float) -> Fit | Skipped:
        monkeypatch.setattr(memory, "host_memory", lambda: size / memory.SCALES_SHARE["cpu"])
        return find_fit(task)

    found = [fit_of(2.0**exponent) for exponent in (10, 19, 19.5, 19.8, 20, 20.2, 21, 22, 24, 30)]
    fits = [fit for fit in found if isinstance(fit, Fit)]
    assert isinstance(found[0], Skipped)
    assert [fit.codes for fit in fits] == sorted(fit.codes for fit in fits)
    assert {fit.codes for fit in fits} == {False, True}
    assert fits[-1] == MOVING
    still = {
        name: scheme.model_copy(update={"bits": 4}) for name, scheme in make_task(tmp_path, "llama").schemes.items()
    }
    assert find_fit(replace(make_task(tmp_path, "llama"), schemes=still, codes=True)) == Fit(4, 0)
    assert [Fit(1, 4, codes=True).lowered(4), Fit(1, 4).lowered(4)] == [Fit(1, 4), None]
    assert Fit(2, 4, codes=True).lowered(4) == Fit(1, 4, codes=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_move_by_the_sign_of_their_scale(symmetric: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    scheme = Scheme(bits=2, group_size=16, symmetric=symmetric)
    codes = torch.randint(4, (6, 32), generator=generator, dtype=torch.uint8)
    scale = torch.randn(6, 2, generator=generator) if symmetric else torch.rand(6, 2, generator=generator) + 0.1
    zero = None if symmetric else torch.randint(4, (6, 2), generator=generator, dtype=torch.uint8)
    weight = AffineWeight(codes, scale.to(dtype), zero, scheme, dtype)
    original = weight.dequantize() + 0.2 * weight.scale.repeat_interleave(16, 1)
    family = IntegerFamily(12, 16, scheme, torch.zeros(12, 16, dtype=dtype), moving=True)
    family.put(slice(0, 12), weight, original)
    family.write(torch.zeros(12))
    assert torch.equal(family.value.view(6, 32), weight.dequantize())
    assert family.codes is not None
    torch.testing.assert_close(
        family.codes.place, codes.view(12, 16) + 0.2, rtol=0, atol=0.02 if dtype.itemsize == 2 else 1e-6
    )
    # y = sum of w_hat * direction: dy/dx is the direction times the scale.
    direction = torch.randn(6, 32, generator=generator).to(dtype)
    sums = torch.zeros(12)
    family.receiver(slice(0, 12), sums)(torch.eye(6, dtype=dtype), direction)
    by_place = direction.view(12, 16) * weight.scale.view(12, 1)
    assert torch.equal(family.codes.gradient.sign(), by_place.sign().to(family.codes.gradient.dtype))
    middle = 2 if zero is None else zero.double().view(12, 1)
    expected = ((codes.double().view(12, 16) - middle) * direction.double().view(12, 16)).sum(1)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


SMALL: dict[str, Any] = {
    "method": "signround",
    "scheme": "mxfp4a16",
    "steps": 4,
    "batch_size": 4,
    "scale_steps": 20,
    "calibration": {"num_samples": 24, "sequence_length": 32},
    "formats": ["native", "compressed-tensors"],
}


@pytest.fixture(scope="module")
def undisturbed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job whose codes move fast, as they do in all of this module's."""
    return finish(small_model, tmp_path_factory.mktemp("undisturbed"), **SMALL)


def stored(workspace: Path, format: str = "native") -> dict[str, Tensor]:
    (file,) = (workspace / "output" / format).glob(ExportFormat(format).info.weight_files[0])
    return load_file(file)


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1)


def test_the_report_counts_the_codes_that_the_checkpoint_has_changed(
    small_model: Path, undisturbed: Finished, tmp_path: Path
) -> None:
    plain = finish(small_model, tmp_path, **(SMALL | {"scale_steps": 0}))
    # As compressed-tensors packs FP4: two codes a byte.
    before, after = (stored(job.workspace, "compressed-tensors") for job in (plain, undisturbed))
    changed = 0
    for name in before:
        if name.endswith("weight_packed"):
            one, other = (indices_of(nibbles(tensors[name])) for tensors in (before, after))
            changed += int((one != other).sum())
        elif name.endswith("weight_scale"):
            assert torch.equal(before[name], after[name])
    report = undisturbed.report.scales
    assert report is not None
    assert report.kept
    assert report.codes == changed > 0
    assert report.norms == 6
    card = (undisturbed.workspace / "output/compressed-tensors/README.md").read_text()
    assert f"- Scales, 6 norms and codes tuned end to end in 20 steps, {changed:,} codes changed" in card


def test_a_job_of_few_bits_tunes_codes_on_text_that_no_block_saw(small_model: Path, tmp_path: Path) -> None:
    few = {key: value for key, value in SMALL.items() if key != "scheme"} | {"bits": 2, "group_size": 16}
    text = {"num_samples": 12, "sequence_length": 32}
    jobs = {
        steps: finish(
            small_model,
            tmp_path / str(steps),
            **(few | {"scale_steps": steps, "calibration": text | {"further_samples": 9}}),
        )
        for steps in (0, 20)
    }
    before, after = (stored(jobs[steps].workspace) for steps in (0, 20))
    codes = [name for name in before if name.endswith(".codes")]
    assert codes
    report = jobs[20].report
    assert report.scales is not None
    assert report.scales.kept
    assert (report.scales.further, report.scales.norms, report.scales.held_out) == (9, 6, 2)
    assert (report.scales.codes or 0) > 0
    assert any(not torch.equal(before[name], after[name]) for name in codes)
    assert jobs[0].report.scales is None
    texts = [job.report.calibration for job in jobs.values()]
    assert texts[0] == texts[1]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", ["while it is saved", "after it is durable"])
def test_a_resumed_job_has_the_codes_of_an_undisturbed_one(
    moment: str, small_model: Path, undisturbed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted

    places = {
        "while it is saved": "workers.engine.finished_blocks.FinishedScales",
        "after it is durable": "workers.engine.evaluate.measure",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[moment], interrupt)
        with pytest.raises(Interrupted):
            run_job(small_model, tmp_path, **SMALL)
    if moment == "after it is durable":
        monkeypatch.setattr(stage_module, "tune_scales", interrupt)
    report = run_job(small_model, tmp_path, **SMALL).report
    assert (report.blocks_computed, report.blocks_resumed) == (0, 3)
    assert report.quality == undisturbed.report.quality
    one, other = stored(undisturbed.workspace), stored(tmp_path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_without_room_for_moving_codes_says_so(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOVING_BYTES", dict.fromkeys((2, 4, 8), 1 << 40))
    monkeypatch.setattr("workers.engine.scales.memory_plan.MOVING_BYTES", memory.MOVING_BYTES)
    lines: list[AttemptLine] = []
    report = run_job(small_model, tmp_path, lines, **SMALL).report.scales
    assert report is not None
    assert report.codes is None
    assert report.norms == 6
    assert "codes_not_tuned" in {line.code for line in lines if isinstance(line, WarningEvent)}
