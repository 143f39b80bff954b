"""Rows of host memory reach the steps as those of the device do."""

from dataclasses import replace

import pytest
import torch

from app.domain.methods import Scheme
from tests.engine.tune.test_tuner import weights_of
from tests.methods.toy_block import toy_task
from workers.contracts.tuning import TuningOutcome, TuningSettings
from workers.engine.tune import minibatches
from workers.engine.tune.minibatches import Minibatches, address

CPU = torch.device("cpu")
SCHEME = Scheme(bits=4, group_size=16, symmetric=True)


@pytest.fixture(params=[False, True], ids=["near", "far"])
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """True if inputs and targets count as lying in another memory than the device's."""
    monkeypatch.setattr(minibatches, "is_far", lambda *_: request.param)
    return bool(request.param)


def test_every_step_finds_its_own_rows(far: bool) -> None:
    inputs, targets = torch.randn(10, 3, 4), torch.randn(10, 3, 4)
    batches, held_out = torch.tensor([[1, 2], [3, 1], [8, 9], [2, 7]]), torch.tensor([0, 4, 5])
    data = Minibatches(inputs, targets, CPU, batches=batches, held_out=held_out)
    for run in range(2):
        data.start()
        places = [t.data_ptr() for t in (data.inputs, data.targets)]
        for step, batch in enumerate(batches):
            data.bring()
            rows = data.rows(torch.tensor([step]))
            assert torch.equal(data.inputs[rows], inputs[batch])
            assert torch.equal(data.targets[rows], targets[batch])
            assert torch.equal(data.inputs[data.held_out], inputs[held_out])
            assert torch.equal(data.targets[data.held_out], targets[held_out])
        assert [t.data_ptr() for t in (data.inputs, data.targets)] == places
        if run == 0:
            batches, held_out = batches.flip(0), held_out.flip(0)
            if far:  # other tensors, too
                inputs, targets = inputs + 1, targets - 1
            data.adopt(inputs, targets, batches=batches, held_out=held_out)


def test_what_lies_far_holds_as_many_rows_as_a_step_and_the_held_out_ones_need(far: bool) -> None:
    inputs = torch.randn(10, 3, 4)
    data = Minibatches(inputs, inputs, CPU, batches=torch.zeros(7, 2, dtype=torch.int64), held_out=torch.arange(3))
    assert len(data.inputs) == (5 if far else 10)
    assert (address(inputs, CPU) == address(inputs.clone(), CPU)) == far


def test_tuning_does_not_see_where_its_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[TuningOutcome] = []
    for where in (False, True):
        monkeypatch.setattr(minibatches, "is_far", lambda *_, where=where: where)
        task = replace(toy_task({"up": SCHEME}, micro_batch=3), seed=5)
        found.append(task.tune(task, [weights_of(task, moves=1e-3)], TuningSettings(9, 8, 0.1)))
    near, far = found
    assert torch.equal(near.linears["up"].weight.codes, far.linears["up"].weight.codes)
    assert (near.loss, near.loss_initial, near.best_step) == (far.loss, far.loss_initial, far.best_step)
    assert near.best_step > 0
