"""The tuning loop's own promises: accumulation, held-out choice, schedule and restoration."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import ApiQSpec, Scheme
from bitwright.errors import NumericalFailure
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.tuning import TuningSettings
from workers.engine.tune import tuner as tuner_module
from workers.engine.tune.sequence_order import minibatches, split
from workers.engine.tune.tuner import Tuner, is_checked
from workers.methods.apiq import ApiQ
from workers.methods.rtn import quantize_weight
from workers.numerics.quantized import LinearResult

SCHEME = Scheme(bits=4, group_size=16, symmetric=True)


@dataclass
class RecordedWeights:
    """Trainable weights that keep what the loop gives them; each step moves them by `moves` times the gradient."""

    value: Tensor
    moves: float = 0.0
    gradients: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    kept: Tensor | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"up": (self.value.shape[0], self.value.shape[1])}

    def write(self, out: Tensor) -> None:
        out.copy_(self.value.flatten())

    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        self.gradients.append(gradient.clone())
        self.rates.append(float(rate))
        self.value = self.value - self.moves * gradient.view_as(self.value)
        self.write(out)

    def keep(self, better: Tensor) -> None:
        if better:
            self.kept = self.value.clone()

    def restart(self) -> None:
        self.kept = None

    def faults(self) -> int:
        return 0

    def adopt(self, other: "RecordedWeights") -> None:
        self.value = other.value

    def results(self) -> dict[str, LinearResult]:
        assert self.kept is not None
        return {"up": LinearResult(quantize_weight(self.kept, SCHEME, torch.float32))}


def weights_of(task: BlockTask, factor: float = 0.9, moves: float = 0.0) -> RecordedWeights:
    return RecordedWeights(task.linear("up").weight.detach() * factor, moves)


def test_the_gradient_is_autograds() -> None:
    task = toy_task({"up": SCHEME})
    weights = weights_of(task)
    task.tune(task, [weights], TuningSettings(1, 8, 0.1))
    training, _ = split(len(task.inputs), task.seed)
    batch = minibatches(training, TuningSettings(1, 8, 0.1), task.seed)[0]
    parameter = (task.linear("up").weight.detach() * 0.9).requires_grad_()
    output = torch.func.functional_call(task.block, {"up.weight": parameter}, task.inputs[batch])
    (output - task.targets[batch]).square().mean().backward()
    assert parameter.grad is not None
    torch.testing.assert_close(weights.gradients[0].view_as(parameter), parameter.grad)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    gradients = []
    for micro_batch in (8, 3, 1):
        task = toy_task({"up": SCHEME}, micro_batch=micro_batch)
        weights = weights_of(task)
        task.tune(task, [weights], TuningSettings(1, 8, 0.1))
        gradients.append(weights.gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_the_rate_decays_linearly_to_zero() -> None:
    task = toy_task({"up": SCHEME})
    weights = weights_of(task)
    task.tune(task, [weights], TuningSettings(4, 8, 0.8))
    assert weights.rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_the_rate_can_stay() -> None:
    task = toy_task({"up": SCHEME})
    weights = weights_of(task)
    task.tune(task, [weights], TuningSettings(4, 8, 0.8, schedule="constant"))
    assert weights.rates == pytest.approx([0.8] * 4)


def test_the_start_is_kept_when_steps_only_harm() -> None:
    task = toy_task({"up": SCHEME})
    weights = weights_of(task, moves=-1000.0)
    start = quantize_weight(weights.value, SCHEME, torch.float32)
    outcome = task.tune(task, [weights], TuningSettings(5, 8, 0.1))
    assert outcome.best_step == 0
    assert outcome.loss == outcome.loss_initial
    assert torch.equal(outcome.linears["up"].weight.codes, start.codes)


def test_the_block_comes_back_whole_even_after_an_error() -> None:
    task = toy_task({"up": SCHEME})
    original = task.linear("up")
    with pytest.raises(NumericalFailure):
        task.tune(task, [weights_of(task, factor=math.nan)], TuningSettings(2, 8, 0.1))
    assert task.linear("up") is original
    assert all(parameter.requires_grad for parameter in task.block.parameters())


def test_a_loss_that_ends_as_nan_is_an_error() -> None:
    task = toy_task({"up": SCHEME})
    with pytest.raises(NumericalFailure, match="after tuning"):
        task.tune(task, [weights_of(task, moves=math.nan)], TuningSettings(2, 8, 0.1))


def test_running_out_of_memory_lowers_the_micro_batch_and_changes_nothing_else() -> None:
    undisturbed = toy_task({"up": SCHEME})
    weights = weights_of(undisturbed)
    undisturbed.tune(undisturbed, [weights], TuningSettings(2, 8, 0.1))

    def forward(block: Any, hidden: Tensor) -> Any:
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("too many at once")
        return block(hidden)

    log: list[tuple[str, int]] = []
    tuner = Tuner(lambda event, **fields: log.append((event, fields["micro_batch"])))
    task = replace(undisturbed, forward=forward, tune=tuner.tune)
    lowered = weights_of(task)
    outcome = task.tune(task, [lowered], TuningSettings(2, 8, 0.1))
    assert log == [("micro_batch_lowered", 4), ("micro_batch_lowered", 2)]
    assert math.isfinite(outcome.loss)
    torch.testing.assert_close(lowered.gradients[-1], weights.gradients[-1])
    task = replace(task, forward=lambda block, hidden: forward(block, hidden.repeat(3, 1, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        task.tune(task, [weights_of(task)], TuningSettings(2, 8, 0.1))


def of_seed(seed: int) -> BlockTask:
    scheme = Scheme(bits=2, group_size=16, symmetric=False)
    task = toy_task({"up": scheme, "down": scheme})
    with torch.no_grad():
        for number, name in enumerate(task.schemes):
            generator = torch.Generator().manual_seed(10 * seed + number)
            task.linear(name).weight.copy_(torch.randn(task.linear(name).weight.shape, generator=generator) / 5)
        return replace(task, seed=seed, inputs=task.inputs.roll(seed, 0), targets=task.block(task.inputs_fp))


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_runs_of_linears_in_turn_come_back_with_the_next_block(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where they are captured: their sequences are copied to where the first block's lie."""
    spec = ApiQSpec(bits=2, rank=4, steps=12, batch_size=4, granularity="layer", learning_rate=5e-3)
    expected = [ApiQ().quantize_block(replace(of_seed(n), tune=Tuner().tune), spec).linears for n in (1, 2, 3)]
    began: list[int] = []
    begin = tuner_module._Run.begin.__func__  # type: ignore[attr-defined]

    def count(cls: Any, task: BlockTask, *given: Any) -> Any:
        began.append(task.index)
        return begin(cls, task, *given)

    monkeypatch.setattr(tuner_module._Run, "begin", classmethod(count))
    monkeypatch.setattr(tuner_module, "room_for_runs", lambda _: room)
    tuner, tasks = Tuner(), [of_seed(number) for number in (1, 2, 3)]
    before = [task.inputs.clone() for task in tasks]
    found = [ApiQ().quantize_block(replace(task, tune=tuner.tune), spec).linears for task in tasks]
    assert len(began) == (2 if room else 6)
    assert all(torch.equal(task.inputs, kept) for task, kept in zip(tasks, before, strict=True))
    for ours, theirs in zip(found, expected, strict=True):
        for name, linear in theirs.items():
            assert torch.equal(ours[name].weight.codes, linear.weight.codes)
            assert torch.equal(ours[name].dequantize(), linear.dequantize())
    tuner.release()
    assert tuner._runs == []


def test_kept_runs_go_before_a_micro_batch_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner_module, "room_for_runs", lambda _: 1 << 30)
    log: list[str] = []
    tuner = Tuner(lambda event, **_: log.append(event))
    first = toy_task({"up": SCHEME})
    tuner.tune(first, [weights_of(first)], TuningSettings(2, 8, 0.1))

    def forward(block: Any, hidden: Tensor) -> Any:
        if len(tuner._runs) > 1:
            raise torch.OutOfMemoryError
        return block(hidden)

    other = replace(first, forward=forward)
    tuner.tune(other, [weights_of(other)], TuningSettings(2, 8, 0.1))
    assert (log, len(tuner._runs)) == ([], 1)


def test_held_out_sequences_never_train() -> None:
    for samples in (2, 5, 32, 500):
        training, held_out = split(samples, seed=1)
        assert not set(training.tolist()) & set(held_out.tolist())
        assert len(training) + len(held_out) == samples
        assert len(held_out) <= 16
    assert split(1, 0)[0].tolist() == split(1, 0)[1].tolist() == [0]


def test_minibatches_pass_over_all_sequences_before_any_repeats() -> None:
    batches = minibatches(torch.arange(24), TuningSettings(7, 8, 0.1), seed=0)
    assert batches.shape == (7, 8)
    assert sorted(batches[:3].flatten().tolist()) == sorted(batches[3:6].flatten().tolist()) == list(range(24))
    assert minibatches(torch.arange(3), TuningSettings(2, 8, 0.1), seed=0).shape == (2, 3)
    assert minibatches(torch.arange(3), TuningSettings(0, 8, 0.1), seed=0).shape == (0, 3)


def test_progress_is_told_and_the_last_step_is_checked() -> None:
    shares: list[float] = []
    task = replace(toy_task({"up": SCHEME}), tick=shares.append)
    task.tune(task, [weights_of(task)], TuningSettings(4, 8, 0.1))
    assert shares == pytest.approx([0.5, 0.75, 1.0])
    for steps in (1, 7, 50, 200, 1000):
        checked = [step for step in range(1, steps + 1) if is_checked(step, steps)]
        assert checked[-1] == steps
        assert len(checked) <= 18
