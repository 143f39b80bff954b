"""Four and eight ranks, which are real processes on a processor, compute what one does."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SignRoundSpec
from tests.engine.device.rank_pair import RankPair
from tests.engine.tune.test_tuner import RecordedWeights, weights_of
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TuningOutcome, TuningSettings
from workers.engine.device.process_group import ProcessGroup, joined
from workers.engine.tune import sequence_order
from workers.engine.tune.sequence_order import minibatches, split
from workers.engine.tune.tuner import Tuner
from workers.methods.sign_round import SignRound

pytestmark = pytest.mark.slow
SCHEME = Scheme(bits=3, group_size=16, symmetric=True)
SEQUENCES = 64
SETTINGS = TuningSettings(4, 8, 0.1, half_batches=2)


@pytest.fixture(scope="module", params=[4, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[int, RankPair]]:
    with RankPair(request.param) as found:
        yield request.param, found


def run_on_all(ranks: tuple[int, RankPair], store: Path, compute: Callable[[ProcessGroup], Any]) -> list[Any]:
    size, processes = ranks
    found = processes.run(connected, size, store, compute)
    if errors := [answer for answer in found if isinstance(answer, Exception)]:
        raise ExceptionGroup(compute.__name__, errors)
    assert len(found) == size
    return found


def connected(rank: int, size: int, store: Path, compute: Callable[[ProcessGroup], Any]) -> Any:
    with joined(ProcessGroup(rank, size), str(store), torch.device("cpu")) as processes:
        return compute(processes)


def whole_task() -> BlockTask:
    task = toy_task({"up": SCHEME, "down": SCHEME}, samples=SEQUENCES)
    inputs, targets = task.inputs.double(), task.targets.double()
    return replace(task, block=task.block.double(), inputs=inputs, inputs_fp=inputs, targets=targets)


def shared_task(processes: ProcessGroup) -> BlockTask:
    task = whole_task()
    inputs, targets = processes.share(task.inputs), processes.share(task.targets)
    return replace(task, inputs=inputs, inputs_fp=inputs, targets=targets, tune=Tuner(processes=processes).tune)


def recorded(processes: ProcessGroup) -> tuple[TuningOutcome, RecordedWeights]:
    task = shared_task(processes)
    weights = weights_of(task)
    return task.tune(task, [weights], SETTINGS), weights


def tuned(processes: ProcessGroup) -> BlockResult:
    return SignRound().quantize_block(shared_task(processes), SignRoundSpec(steps=40, scale_search=False))


def own_split(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every rank's training and held-out sequences among its own; as many in each."""
    return split(SEQUENCES // size, seed, sequence_order.MOST_HELD_OUT // size)


def of_all(own: Tensor, size: int) -> Tensor:
    """Indices among all sequences of what every rank picks among its own, in the last dimension."""
    return torch.cat([own * size + rank for rank in range(size)], dim=-1)


def test_summed_gradients_are_those_of_one_process(ranks: tuple[int, RankPair], tmp_path: Path) -> None:
    """The oracle is autograd in fp64, without the tuner; of a half batch a rank reads half, or its only sequence."""
    size, task = ranks[0], whole_task()
    found = run_on_all(ranks, tmp_path / "store", recorded)
    training, held_out = own_split(size, task.seed)
    own = minibatches(training, replace(SETTINGS, batch_size=8 // size), task.seed)
    parameter = (task.linear("up").weight.detach() * 0.9).requires_grad_()
    for step, batch in enumerate(own):
        read = of_all(batch[: max(1, len(batch) // 2)] if step < SETTINGS.half_batches else batch, size)
        output = torch.func.functional_call(task.block, {"up.weight": parameter}, task.inputs[read])
        (expected,) = torch.autograd.grad((output - task.targets[read]).square().mean(), parameter)
        for _, weights in found:
            gradient = weights.gradients[step].view_as(expected)
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    rows = of_all(held_out, size)
    with torch.no_grad():
        output = torch.func.functional_call(task.block, {"up.weight": parameter}, task.inputs[rows])
        error = float((output - task.targets[rows]).square().mean())
    assert [float(outcome.loss_initial) for outcome, _ in found] == pytest.approx([error] * size, rel=1e-10)


def test_all_ranks_end_with_the_same_codes(ranks: tuple[int, RankPair], tmp_path: Path) -> None:
    first, *others = run_on_all(ranks, tmp_path / "store", tuned)
    assert first.loss < 0.9 * first.loss_initial
    for other in others:
        assert (first.loss, first.loss_initial) == (other.loss, other.loss_initial)
        for name, linear in first.linears.items():
            assert torch.equal(linear.affine.codes, other.linears[name].affine.codes)
            assert torch.equal(linear.affine.scale, other.linears[name].affine.scale)
