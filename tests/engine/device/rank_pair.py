"""Two real processes that stay, so that every test of ranks need not wait until torch is loaded twice."""

import faulthandler
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from app.domain.attempt_lines import AttemptLine, ResultLine
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import LocalText
from workers.disk.orders import AttemptOrder
from workers.engine.finished_blocks import FinishedBlocks, Shard
from workers.engine.reporter import Reporter
from workers.engine.run import assist, run
from workers.supervise.child_env import RANKS

SIZE = 2
STUCK = 60.0
"""Seconds after which a rank prints where its threads are."""
AFTER_AN_ERROR = 20.0
"""Seconds that a rank has to end in after another one's error."""


class RankPair:
    """Runs a function of the rank and other arguments on both ranks, or on `size` of them, at once."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        # Forked from a process that has loaded torch for both; a GPU's driver is better met by new processes.
        spawn, fork = multiprocessing.get_context("spawn"), multiprocessing.get_context("forkserver")
        fork.set_forkserver_preload([__name__])
        context = spawn if torch.cuda.is_available() else fork
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(self._size):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            self._connections.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 200) -> list[Any]:
        """The value that the function returns on each rank, or the exception that it raises.

        A rank that waits for another one, which has failed, is given up; both processes are new then.
        """
        for connection in self._connections:
            connection.send((function, arguments))
        answers: dict[Connection, Any] = {}
        until = time.monotonic() + seconds
        while waiting := [c for c in self._connections if c not in answers]:
            ready = wait(waiting, max(0.0, until - time.monotonic()))
            if not ready:
                self._stop()
                self._start()
                return [*answers.values(), TimeoutError(f"{function.__name__} did not return on every rank")]
            answers |= {c: c.recv() for c in self._connections if c in ready}
            if any(isinstance(answer, Exception) for answer in answers.values()):
                until = min(until, time.monotonic() + AFTER_AN_ERROR)
        return [answers[connection] for connection in self._connections]

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


def serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    for name, value in RANKS.items():  # as an attempt's ranks have it
        os.environ.setdefault(name, value)
    while True:
        function, arguments = connection.recv()
        faulthandler.dump_traceback_later(STUCK)
        try:
            connection.send(function(rank, *arguments))
        except Exception as error:
            connection.send(error)
        faulthandler.cancel_dump_traceback_later()


def order_of(
    model: Path, workspace: Path, body: dict[str, Any], attempt: int, device: str, base: Path | None = None
) -> AttemptOrder:
    request = JobRequest.parse(json.loads(json.dumps({"model": str(model)} | body)))
    loss_mask = None if request.finetune is None else request.finetune.dataset
    return AttemptOrder(
        job_id="job_1",
        attempt=attempt,
        request=request,
        model_path=str(model),
        finetuning_path=loss_mask.path if isinstance(loss_mask, LocalText) else None,
        base_job_path=None if base is None else str(base),
        world_size=SIZE,
        rendezvous=str(workspace / f"rendezvous-{attempt}"),
        device="cuda" if device == "cuda" else "cpu",
    )


@dataclass(frozen=True)
class RankRun:
    """Record of a rank in a job: the result and lines of the first one, and the tensors that each made by block."""

    result: ResultLine | None
    lines: list[AttemptLine]
    made: dict[int, dict[str, Tensor]]


def run_job_on_ranks(
    rank: int,
    model: Path,
    workspace: Path,
    body: dict[str, Any],
    attempt: int = 1,
    device: str = "cpu",
    base: Path | None = None,
) -> RankRun:
    """A job, as one of the ranks; `base` has the checkpoints that it starts from."""
    made: dict[int, dict[str, Tensor]] = {}
    lines: list[AttemptLine] = []
    write = FinishedBlocks.write_shard

    def record(
        state: FinishedBlocks, index: int, weights: Any, parameters: Any = None, caches: Any = None, inputs: Any = None
    ) -> Shard:
        made[index] = {f"{n}.{k}": t.cpu().clone() for n, w in weights.items() for k, t in tensors(w).items()}
        made[index] |= {n: tensor.cpu().clone() for n, tensor in (parameters or {}).items()}
        return write(state, index, weights, parameters or {}, caches or {}, inputs or {})

    try:
        with patch.object(FinishedBlocks, "write_shard", record):
            order, result = order_of(model, workspace, body, attempt, device, base), None
            if rank:
                assist(order, workspace, rank)
            else:
                result = run(order, workspace, Reporter(lines.append))
            return RankRun(result, lines, made)
    finally:
        if dist.is_initialized():  # after an error of all ranks
            dist.destroy_process_group()


def tensors(part: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in a dataclass, and in those that it holds."""
    if isinstance(part, Tensor):
        return {path: part}
    if not is_dataclass(part):
        return {}
    found: dict[str, Tensor] = {}
    for field in fields(part):
        found |= tensors(getattr(part, field.name), f"{path}.{field.name}")
    return found
