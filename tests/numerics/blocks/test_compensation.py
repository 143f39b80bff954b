"""Elimination and sweeps as one call: on a GPU the second call of a kind is captured, and later ones are replayed."""

from functools import partial

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from tests.numerics.blocks.test_descent import problem
from workers.methods.gptq import Elimination
from workers.numerics.blocks import compensation
from workers.numerics.blocks.compensation import compensate
from workers.numerics.blocks.descent import descend
from workers.numerics.blocks.elimination import eliminate
from workers.numerics.quantized import BlockWeight

PARTS = ("codes", "scale", "scale_codes", "minimum", "minimum_codes")
Given = tuple[Tensor, Scheme, Tensor, Tensor, None, Tensor, int]


def given(name: str, columns: int, seed: int, device: str) -> Given:
    weight, hessian = problem(columns, 48, seed)
    weight, hessian = weight.bfloat16().to(device), hessian.float().to(device)
    made = Elimination.of(hessian, 0.01, act_order=False)
    assert made is not None
    return weight, Scheme.named(SchemeName(name)), made.factor, hessian.diagonal(), None, hessian, 2


def plainly(call: Given) -> BlockWeight:
    weight, scheme, factor, moments, _, damped, sweeps = call
    return descend(weight, eliminate(weight, scheme, factor, moments), damped, sweeps)


def assert_same(one: BlockWeight, other: BlockWeight) -> None:
    for part in PARTS:
        mine, theirs = getattr(one, part), getattr(other, part)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_the_call_is_elimination_and_then_descent() -> None:
    call = given("q3_k", 256, 5, "cpu")
    assert_same(compensate(*call), plainly(call))
    weight, scheme, factor, moments, *_ = call
    assert_same(compensate(weight, scheme, factor, moments), eliminate(weight, scheme, factor, moments))


class Replay:
    """A graph that does nothing when it is replayed."""

    def replay(self) -> None:
        pass


def test_a_graph_that_says_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording of the first weight, replayed for the second: it stays what it was."""
    calls = [given("q4_0", 96, seed, "cpu") for seed in range(4)]
    made = {seed: plainly(call) for seed, call in enumerate(calls)}

    def found(captured: int) -> list[BlockWeight]:
        recorder, turns = compensation._Recorder(), iter(range(4))

        def capture(*_: object) -> None:
            recorder._graph, recorder._made = Replay(), made[captured]  # type: ignore[assignment]

        monkeypatch.setattr(recorder, "_capture", capture)
        return [recorder.result(partial(made.__getitem__, seed), ()) for seed in turns]

    for one, other in zip(found(captured=0), made.values(), strict=True):
        assert_same(one, other)
    replayed = found(captured=1)
    assert_same(replayed[1], made[1])
    assert_same(replayed[3], made[1])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "columns"), [("q3_k", 512), ("q2_k", 256), ("q5_1", 160), ("q4_0", 576)])
def test_replays_say_what_kernels_say_and_keep_what_they_said(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = fresh(monkeypatch)
    calls = [given(name, columns, seed, "cuda") for seed in range(4)]
    expected = [plainly(call) for call in calls]
    found = [compensate(*call) for call in calls[:2]]  # one of them is captured
    assert recorder.unused is None
    monkeypatch.setattr(compensation, "eliminate", _never)  # what follows is replayed
    found += [compensate(*call) for call in calls[2:]]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_called_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = fresh(monkeypatch)
    calls = [given("q4_0", 96, seed, "cuda") for seed in range(4)]
    expected, waits = [plainly(call) for call in calls], eliminate

    def waiting(*of: Tensor) -> BlockWeight:
        torch.cuda.synchronize()
        return waits(*of)  # type: ignore[arg-type]

    monkeypatch.setattr(compensation, "eliminate", waiting)
    for call, other in zip(calls, expected, strict=True):
        assert_same(compensate(*call), other)
    assert recorder.unused is not None


@pytest.mark.gpu
def test_a_graph_is_captured_after_one_that_could_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that a failed one was to have is not begun with again."""

    def waiting(*_: Tensor) -> BlockWeight:
        torch.cuda.synchronize()
        return plainly(call)

    call, failed = given("q4_0", 96, 0, "cuda"), fresh(monkeypatch)
    for _ in range(3):
        assert_same(failed.result(waiting, (call[0],)), plainly(call))
    later = compensation._Recorder()
    for _ in range(3):
        assert_same(later.result(lambda *_: plainly(call), (call[0],)), plainly(call))
    assert failed.unused is not None
    assert later.unused is None


def fresh(monkeypatch: pytest.MonkeyPatch) -> compensation._Recorder:
    """One recorder of all kinds, and a pool that no graph has held: one goes with the last of its graphs."""
    recorder = compensation._Recorder()
    monkeypatch.setattr(compensation, "_recorder", lambda _: recorder)
    compensation._pool.cache_clear()
    return recorder


def _never(*_: object) -> BlockWeight:
    raise AssertionError("it is called")
