"""Blocks are read, tuned and written at the same time: in what order things count, and what errors and kills cost."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.domain.attempt_lines import AttemptLine
from bitwright.errors import DiskFull, NumericalFailure, OutOfGpuMemory
from bitwright.events import BlockEvent
from tests.engine.conftest import run_job
from workers.child.exceptions import as_bitwright_error
from workers.disk.durable import replace_file
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.registry import METHODS

TUNED: dict[str, Any] = {"method": "signround", "bits": 3, "steps": 6, "batch_size": 4, "learning_rate": 0.05}
PATIENCE = 20.0


class Timeline:
    """Events in order; anyone may wait for something to happen."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self._changed = threading.Condition()

    def note(self, what: str, block: int) -> None:
        with self._changed:
            self.seen.append((what, block))
            self._changed.notify_all()

    def wait_for(self, what: str, block: int, seconds: float = PATIENCE) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: (what, block) in self.seen, seconds)

    def first(self, what: str, block: int) -> int:
        return self.seen.index((what, block))


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    """Of reads, of what methods do, and of blocks that become durable."""
    found, method = Timeline(), METHODS["signround"]
    quantize_block, finish, read = method.quantize_block, FinishedBlocks.finish, StreamedModel.read

    def watched_read(model: StreamedModel, name: str, *rest: Any) -> Any:
        weights = read(model, name, *rest)
        if name.startswith("model.layers."):
            found.note("read", int(name.rpartition(".")[2]))
        return weights

    def watched_quantize(task: Any, spec: Any) -> Any:
        def tick(share: float) -> None:
            task.tick(share)
            found.note("told its progress", task.index)

        found.note("begun", task.index)
        result = quantize_block(replace(task, tick=tick), spec)
        found.note("ended", task.index)
        return result

    def watched_finish(state: FinishedBlocks, index: int, *rest: Any) -> None:
        finish(state, index, *rest)
        found.note("durable", index)

    monkeypatch.setattr(method, "quantize_block", watched_quantize)
    monkeypatch.setattr(FinishedBlocks, "finish", watched_finish)
    monkeypatch.setattr(StreamedModel, "read", watched_read)
    return found


def before(target: type, name: str, act: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`act` is called with the first argument of each call of a method, before it."""
    original = getattr(target, name)

    def acting(self: Any, first: Any, *rest: Any) -> Any:
        act(first)
        return original(self, first, *rest)

    monkeypatch.setattr(target, name, acting)


def test_a_block_is_tuned_while_the_next_is_read_and_the_last_written(
    timeline: Timeline, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold(index: int) -> None:
        if index < 2:
            assert timeline.wait_for("begun", index + 1), "nothing begins before the block before is durable"
            assert timeline.wait_for("read", min(index + 2, 2)), "nothing is read meanwhile"
            # Long enough for the method to get on, if it did not wait.
            assert not timeline.wait_for("told its progress", index + 1, seconds=0.5)

    before(FinishedBlocks, "finish", hold, monkeypatch)
    lines: list[AttemptLine] = []
    started = time.perf_counter()
    report = run_job(small_model, tmp_path, lines, **TUNED).report
    wall = time.perf_counter() - started
    for block in (1, 2):
        written = timeline.first("durable", block - 1)
        assert timeline.first("begun", block) < written < timeline.first("told its progress", block)
        assert written < timeline.first("ended", block)
    assert [line.index for line in lines if isinstance(line, BlockEvent)] == [0, 1, 2]
    assert report.seconds["total"] == pytest.approx(wall, abs=0.05 * wall + 0.2)
    assert report.seconds["quantize"] > 1.0, "whoever waits counts the time"


def test_a_block_is_told_of_when_it_is_durable_and_all_are_at_the_end(small_model: Path, tmp_path: Path) -> None:
    class Lines(list[AttemptLine]):
        def append(self, line: AttemptLine) -> None:
            super().append(line)
            if isinstance(line, BlockEvent):
                assert durable(tmp_path) == list(range(line.index + 1))

    lines = Lines()
    run_job(small_model, tmp_path, lines, **TUNED)
    assert [line.index for line in lines if isinstance(line, BlockEvent)] == [0, 1, 2]


def failing_write(number: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `number`th file that is to become durable meets an error, and so does every later one."""
    calls = Counter[str]()

    def write(path: Path, data: bytes) -> None:
        calls["write"] += 1
        if calls["write"] >= number:
            raise error
        replace_file(path, data)

    monkeypatch.setattr("workers.engine.finished_blocks.replace_file", write)


def durable(workspace: Path) -> list[int]:
    """The blocks that a later attempt would adopt, by state.json."""
    found = json.loads((workspace / "state" / "state.json").read_bytes())
    return [block["index"] for block in found["blocks"]]


@pytest.mark.parametrize(
    ("error", "known", "number"),
    [
        (OSError(28, "No space left on device"), DiskFull, 4),
        # The tuner must not take it for its own and go on with less.
        (torch.OutOfMemoryError("while packing"), OutOfGpuMemory, 3),
    ],
)
def test_an_error_of_the_writer_ends_the_job_as_what_it_is(
    error: Exception, known: type, number: int, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_write(number, error, monkeypatch)
    with pytest.raises(type(error)) as caught:
        run_job(small_model, tmp_path, **TUNED)
    assert caught.value is error
    assert isinstance(as_bitwright_error(caught.value), known)
    assert durable(tmp_path) == [0]


def test_a_block_whose_output_is_not_finite_is_an_error_and_never_durable(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Counter[str]()

    def overflowing(stream: Activations) -> torch.Tensor:
        seen["block"] += 1
        return torch.tensor([torch.inf if seen["block"] == 2 else 1.0, 1.0], dtype=torch.float64)

    monkeypatch.setattr(Activations, "squared_error", overflowing)
    with pytest.raises(NumericalFailure, match="block 1: the output error is inf"):
        run_job(small_model, tmp_path, **TUNED)
    assert durable(tmp_path) == [0]


def test_a_block_that_cannot_be_read_costs_none_of_those_before(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == "model.layers.2":
            raise NumericalFailure("the third block is not finite")

    before(StreamedModel, "read", fail, monkeypatch)
    with pytest.raises(NumericalFailure, match="the third block"):
        run_job(small_model, tmp_path, **TUNED)
    assert durable(tmp_path) == [0, 1]


@pytest.mark.slow
def test_a_kill_costs_at_most_one_block_whose_method_ended(small_model: Path, tmp_path: Path) -> None:
    """SIGKILL of a real process within its writes: before a shard, between shard and state.json, after state.json."""
    moments = ["before:1", "before:4", "after:2"]
    command = [
        sys.executable,
        "-m",
        "tests.engine.quantize.killed_job",
        str(small_model),
        str(tmp_path / "killed"),
        *moments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["endings"] == [-signal.SIGKILL] * len(moments) + [0], done.stderr
    counts = Counter(what for what, _ in found["facts"])
    told = [block for what, block in found["facts"] if what == "told"]
    assert counts["ended"] <= 3 + len(moments)
    assert counts["ended"] > 3, "no kill cost anything"
    assert counts["told too early"] == 0
    assert len(told) == len(set(told)) <= 3
    run_job(small_model, tmp_path / "whole", evaluation=None, **TUNED)
    one, other = (load_file(tmp_path / name / "output/native/weights.safetensors") for name in ("killed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
