"""The exchange of methods with the engine: sums over ranks, settings of the loop, counters and progress.

Two ranks that share the calibration make what one process makes of all of it.

The ranks are threads that exchange sums; `tests/engine/device` has the processes. Blocks are in fp64, so that another
order of sums changes no code.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import ApiQSpec, AWQSpec, GPTQSpec, OmniQuantSpec, RTNSpec, Scheme, SignRoundSpec, WeightSpec
from tests.methods.toy_block import gated_task
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TrainableWeights, TuningOutcome, TuningSettings
from workers.engine.quantize.registry import METHODS
from workers.methods.apiq import ApiQ
from workers.methods.awq import observe

W3 = Scheme(bits=3, group_size=16, symmetric=False)


@dataclass
class Exchange:
    """Sums over two threads."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))
    given: list[list[Tensor]] = field(default_factory=lambda: [[], []])

    def sum_of(self, rank: int) -> Callable[..., None]:
        def sum_(*tensors: Tensor) -> None:
            self.given[rank] = [tensor.clone() for tensor in tensors]
            self.barrier.wait()
            totals = [mine + theirs for mine, theirs in zip(*self.given, strict=True)]
            self.barrier.wait()
            for tensor, total in zip(tensors, totals, strict=True):
                tensor.copy_(total)

        return sum_


def whole(**changed: Any) -> BlockTask:
    """Sequences that grow, so that halves of them are not alike."""
    task = gated_task(dict.fromkeys(("gate", "up", "down"), W3), samples=8, length=12, **changed)
    block, hidden = task.block.double(), task.inputs.double()
    hidden[:, :, 11] *= torch.arange(1.0, 9.0).unsqueeze(1) ** 2
    with torch.no_grad():
        return replace(task, inputs=hidden, inputs_fp=hidden, targets=block(hidden))


def shares() -> list[BlockTask]:
    exchange, tasks = Exchange(), []
    for rank in range(2):
        task, rows = whole(), slice(rank, None, 2)
        parts = {name: getattr(task, name)[rows] for name in ("inputs", "inputs_fp", "targets")}
        tasks.append(replace(task, sum_=exchange.sum_of(rank), **parts))
    return tasks


def both(work: Callable[[BlockTask], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, shares()))


@pytest.mark.parametrize("spec", [GPTQSpec(), AWQSpec()], ids=lambda spec: str(spec.method))
def test_sums_over_all_ranks_are_what_a_block_is_quantized_by(spec: WeightSpec) -> None:
    def quantized(task: BlockTask) -> BlockResult:
        return METHODS[spec.method].quantize_block(task, spec)

    alone, half = quantized(whole()), quantized(replace(shares()[0], sum_=lambda *_: None))
    for found in both(quantized):
        for name, linear in alone.linears.items():
            assert torch.equal(found.linears[name].weight.codes, linear.weight.codes)
    assert any(not torch.equal(half.linears[n].weight.codes, of.weight.codes) for n, of in alone.linears.items())


@torch.no_grad()
def test_what_awq_observes_is_of_the_tokens_of_all_ranks() -> None:
    task = whole()
    alone = observe(task, task.inputs)
    for found in both(lambda part: observe(part, part.inputs)):
        for name, seen in alone.items():
            assert found[name].tokens == 8 * 12
            torch.testing.assert_close(found[name].magnitude(), seen.magnitude())
            torch.testing.assert_close(found[name].hessian(W3), seen.hessian(W3))


def settings_of(spec: WeightSpec, *, ranks: int = 1, samples: int = 8) -> TuningSettings:
    """What the tuning loop is asked for when every rank has its part of the sequences."""
    asked: list[TuningSettings] = []

    class Asked(Exception):
        pass

    def tune(task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings) -> TuningOutcome:
        asked.append(settings)
        raise Asked

    def sum_(*tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.mul_(ranks)

    task = gated_task(dict.fromkeys(("gate", "up", "down"), W3), samples=samples // ranks, length=4)
    with pytest.raises(Asked):
        METHODS[spec.method].quantize_block(replace(task, tune=tune, sum_=sum_), spec)
    return asked[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (OmniQuantSpec(epochs=5, batch_size=2), TuningSettings(20, 2, 5e-3, "constant")),
        (OmniQuantSpec(epochs=3, batch_size=3, learning_rate=0.1), TuningSettings(6, 3, 0.1, "constant")),
        (SignRoundSpec(steps=50, batch_size=4), TuningSettings(50, 4, 0.02, "linear")),
        (SignRoundSpec(steps=50, batch_size=2, learning_rate=0.3), TuningSettings(50, 2, 0.3, "linear")),
        (SignRoundSpec(quick_steps=True), TuningSettings(200, 8, 0.005, half_batches=150, gradients="quick")),
        (ApiQSpec(steps=40, batch_size=2), TuningSettings(40, 2, 5e-3, "constant")),
        (ApiQSpec(steps=40, range_learning_rate=0.2), TuningSettings(40, 1, 0.2, "constant")),
    ],
    ids=lambda value: str(getattr(value, "method", "")),
)
def test_steps_and_rates_are_the_same_whatever_the_number_of_ranks(
    spec: WeightSpec, expected: TuningSettings, ranks: int
) -> None:
    assert settings_of(spec, ranks=ranks) == expected


def test_fewer_sequences_than_a_batch_make_one_step_an_epoch() -> None:
    assert settings_of(OmniQuantSpec(epochs=7, batch_size=16), ranks=2).steps == 7


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (OmniQuantSpec(epochs=2), {"best_step": 5, "nan_gradients": 3}),
        (SignRoundSpec(steps=6), {"best_step": 5, "nan_gradients": 3}),
        (ApiQSpec(steps=6, rank=2), {"best_step": 5, "nan_gradients": 3}),
        # gate and up share a loop, down has its own
        (ApiQSpec(steps=6, rank=2, granularity="layer"), {"mean_best_step": 5, "nan_gradients": 6}),
    ],
    ids=lambda value: str(getattr(value, "method", "")),
)
def test_what_the_loop_found_is_told(spec: WeightSpec, expected: dict[str, float]) -> None:
    made = gated_task(dict.fromkeys(("gate", "up", "down"), W3), samples=8, length=4)
    loop = made.tune

    def tune(task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings) -> TuningOutcome:
        return replace(loop(task, weights, settings), best_step=5, faults=3)

    assert METHODS[spec.method].quantize_block(replace(made, tune=tune), spec).counters == expected


def test_a_base_is_a_fifth_of_a_block_s_progress() -> None:
    shares: list[float] = []
    task = gated_task(dict.fromkeys(("gate", "up", "down"), W3), samples=8, length=4, tick=shares.append)
    base: list[int] = []

    def quantize(task: BlockTask, spec: WeightSpec) -> BlockResult:
        assert spec.method == "signround"
        task.tick(1.0)
        base.append(len(shares))
        return METHODS["rtn"].quantize_block(task, RTNSpec())

    ApiQ().quantize_block(replace(task, quantize=quantize), ApiQSpec(steps=10, rank=2, base="signround"))
    assert base == [1]
    assert shares[0] == pytest.approx(0.2)
    assert shares[-1] == 1
