"""Batches that go through captured passes; their results are compared on a GPU (test_cuda_training)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from workers.engine.device.cuda_graphs import capturing
from workers.engine.finetune import captured_passes
from workers.engine.finetune.captured_passes import EAGER_FIRST, MOST_SHAPES, Passes
from workers.engine.text.packing import Batch


def batch(rows: int, length: int = 8, *, packed: bool = False) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return Batch(ids, ids, ids.int() if packed else None, ids.flatten(), ids.flatten(), ids.numel())


class Captures:
    """In place of a GPU: which shapes were captured, each time with how many trained parameters."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int, bool, int]] = []
        self.error: RuntimeError | None = None

    def of(self, resident: Any, given: Batch, trained: list[nn.Parameter], pool: Any) -> Any:
        if self.error is not None:
            raise self.error
        rows, length = given.ids.shape
        self.taken.append((rows, length, given.documents is not None, len(trained)))
        return SimpleNamespace(run=f"graph {len(self.taken)}", forward=SimpleNamespace(pool=lambda: "pool"))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(captured_passes._Graphs, "of", found.of)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return found


@pytest.fixture
def adapter() -> nn.Linear:
    return nn.Linear(2, 2)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def passes(adapter: nn.Linear, told: list[str]) -> Passes:
    resident: Any = SimpleNamespace(adapters={"only": adapter}, is_capturable=True)
    return Passes(resident, lambda event, **_: told.append(event), captures=True)


def met(passes: Passes, given: Batch, times: int = EAGER_FIRST + 1) -> object:
    """The pass that the last of several batches goes through."""
    run: Callable[..., Any] | None = None
    for _ in range(times):
        run = passes.of(given)
    return run


def test_a_shape_is_captured_when_it_has_come_a_few_times(passes: Passes, captures: Captures) -> None:
    assert met(passes, batch(4), EAGER_FIRST) == passes._eager
    assert met(passes, batch(4), 1) == "graph 1"
    assert met(passes, batch(3), 1) == passes._eager, "another number of rows"
    assert met(passes, batch(4, packed=True), 1) == passes._eager, "other masks"
    assert met(passes, batch(4), 5) == "graph 1"
    assert captures.taken == [(4, 8, False, 2)]


def test_there_are_only_so_many_graphs(passes: Passes, captures: Captures) -> None:
    for rows in range(1, MOST_SHAPES + 2):
        met(passes, batch(rows))
    assert len(captures.taken) == MOST_SHAPES
    assert met(passes, batch(MOST_SHAPES + 1)) == passes._eager
    assert met(passes, batch(1)) == "graph 1"


def test_parameters_that_are_held_from_a_step_on_begin_new_graphs(
    passes: Passes, captures: Captures, adapter: nn.Linear
) -> None:
    for rows in range(1, MOST_SHAPES + 1):
        met(passes, batch(rows))
    adapter.bias.requires_grad_(False)
    assert met(passes, batch(1), EAGER_FIRST) == passes._eager
    assert met(passes, batch(1), 1) == f"graph {MOST_SHAPES + 1}"
    assert captures.taken[-1] == (1, 8, False, 1)


def test_a_capture_that_fails_is_the_last(passes: Passes, captures: Captures, told: list[str]) -> None:
    met(passes, batch(1))
    captures.error = torch.OutOfMemoryError("none left")
    assert met(passes, batch(2)) == passes._eager
    assert told == ["training_capture_failed"]
    captures.error = None
    assert met(passes, batch(1)) == passes._eager
    assert told == ["training_capture_failed"]


def test_work_goes_on_on_its_stream_after_a_capture_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's context leaves it that ends by an error."""
    streams = ["main"]

    @contextmanager
    def failing(*_: object, **__: object) -> Iterator[None]:
        streams.append("capture")
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    graph: Any = None
    with pytest.raises(RuntimeError, match="not permitted"), capturing(graph):
        assert streams[-1] == "capture"
    assert streams[-1] == "main"


def test_an_operator_without_a_deterministic_kernel_is_not_a_failed_capture(passes: Passes, captures: Captures) -> None:
    captures.error = RuntimeError("x does not have a deterministic implementation")
    with pytest.raises(RuntimeError, match="deterministic"):
        met(passes, batch(1))
    captures.error = None
    assert met(passes, batch(1)) == "graph 1"


@pytest.mark.parametrize(("plan", "model"), [(False, True), (True, False)])
def test_nothing_is_captured_where_the_plan_or_the_model_does_not_allow_it(
    adapter: nn.Linear, captures: Captures, *, plan: bool, model: bool
) -> None:
    resident: Any = SimpleNamespace(adapters={"only": adapter}, is_capturable=model)
    passes = Passes(resident, lambda *_, **__: None, captures=plan)
    assert met(passes, batch(1)) == passes._eager
    assert captures.taken == []
