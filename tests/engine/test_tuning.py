"""The tuning loop's own promises: accumulation, held-out choice, schedule and restoration."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from app.domain.errors import NumericalFailure
from app.domain.methods import Scheme
from tests.methods.toy_block import toy_task
from workers.contracts import TuningSettings
from workers.engine.tuning import is_checked, minibatches, split, tune
from workers.methods.rtn import quantize_weight
from workers.numerics.quantized import LinearResult

SCHEME = Scheme(bits=4, group_size=16, symmetric=True)


@dataclass
class RecordedWeight:
    """A trainable weight that keeps what the loop gives it; descends if `moves`."""

    value: Tensor
    moves: float = 0.0
    gradients: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def weight(self) -> Tensor:
        return self.value

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        self.gradients.append(gradient.clone())
        self.rates.append(learning_rate)
        self.value = self.value - self.moves * gradient

    def result(self) -> LinearResult:
        return LinearResult(quantize_weight(self.value, SCHEME, torch.float32))


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    gradients = []
    for micro_batch in (8, 3, 1):
        task = toy_task({"up": SCHEME}, micro_batch=micro_batch)
        weight = RecordedWeight(task.linear("up").weight.detach() * 0.9)
        tune(task, {"up": weight}, TuningSettings(1, 8, 0.1))
        gradients.append(weight.gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_the_rate_decays_linearly_to_zero() -> None:
    task = toy_task({"up": SCHEME})
    weight = RecordedWeight(task.linear("up").weight.detach())
    tune(task, {"up": weight}, TuningSettings(4, 8, 0.8))
    assert weight.rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_the_start_is_kept_when_steps_only_harm() -> None:
    task = toy_task({"up": SCHEME})
    weight = RecordedWeight(task.linear("up").weight.detach() * 0.9, moves=-1000.0)
    start = weight.result().weight.codes
    outcome = tune(task, {"up": weight}, TuningSettings(5, 8, 0.1))
    assert outcome.best_step == 0
    assert outcome.loss == outcome.loss_initial
    assert torch.equal(outcome.linears["up"].weight.codes, start)


def test_the_block_comes_back_whole_even_after_an_error() -> None:
    task = toy_task({"up": SCHEME})
    original = task.linear("up").weight
    broken = RecordedWeight(torch.full_like(original, float("nan")))
    with pytest.raises(NumericalFailure):
        tune(task, {"up": broken}, TuningSettings(2, 8, 0.1))
    assert task.linear("up").weight is original
    assert all(parameter.requires_grad for parameter in task.block.parameters())


def test_held_out_sequences_never_train() -> None:
    for samples in (2, 5, 32, 500):
        training, held_out = split(samples, seed=1)
        assert not set(training.tolist()) & set(held_out.tolist())
        assert len(training) + len(held_out) == samples
        assert len(held_out) <= 16
    assert split(1, 0)[0].tolist() == split(1, 0)[1].tolist() == [0]


def test_minibatches_pass_over_all_sequences_before_any_repeats() -> None:
    drawn = minibatches(torch.arange(24), 8, seed=0)
    first_pass = torch.cat([next(drawn) for _ in range(3)])
    assert sorted(first_pass.tolist()) == list(range(24))
    assert len(next(minibatches(torch.arange(3), 8, seed=0))) == 3


def test_progress_is_told_and_the_last_step_is_checked() -> None:
    shares: list[float] = []
    task = replace(toy_task({"up": SCHEME}), tick=shares.append)
    tune(task, {"up": RecordedWeight(task.linear("up").weight.detach())}, TuningSettings(4, 8, 0.1))
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0])
    for steps in (1, 7, 50, 200, 1000):
        checked = [step for step in range(1, steps + 1) if is_checked(step, steps)]
        assert checked[-1] == steps
        assert len(checked) <= 18
