"""The birth of an attempt's process: for a job that is there, or as a spare that waits for an order.

    python -P -m workers.child.attempt WORKSPACE [RANK]
    python -P -m workers.child.attempt --spare DESCRIPTOR DEVICE

A spare follows its supervisor from its first moment, imports and opens what every attempt takes seconds to import and
open, and waits at one end of a pair of sockets. It takes one order, a JSON line, with the descriptors that go along;
from then on it is that attempt. Until then it knows nothing of any job: not in its environment, not in its files.
"""

import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from workers.child.confinement import confine
from workers.child.lifeline import (
    ATTEMPT,
    ATTEMPT_OOM_SCORE,
    JOB_ID,
    SPARE_OOM_SCORE,
    follow_supervisor,
    log_as_json,
    name_in_log,
    prefer_for_oom_kill,
)
from workers.disk.orders import SpareOrder

SPARE = "--spare"
READY, TAKEN = b"r", b"t"
"""A spare's two words to its supervisor: it waits; it has read its order."""
ORDER_BYTES = 1 << 16
MOST_DESCRIPTORS = 8


@dataclass(frozen=True)
class Birth:
    """The place of an attempt's process.

    given   descriptors that the supervisor gave: its number of each -> the number here
    """

    workspace: Path
    rank: int = 0
    given: Mapping[int, int] = field(default_factory=dict)


def born(arguments: list[str], prepare: Callable[[str], Callable[[], object]]) -> Birth:
    """Arrange that this process ends with its supervisor, and find the place of its job; call it first.

    prepare   what a spare does with its device's name ("cpu" or "cuda") before it waits; what it returns is done with
              the order in hand. A spare that ends then has not taken the order
    """
    is_spare = arguments[0] == SPARE
    rank = int(arguments[1]) if len(arguments) > 1 and not is_spare else 0
    confine(None if is_spare else Path(arguments[0]), rank)
    follow_supervisor()
    if not is_spare:
        prefer_for_oom_kill(ATTEMPT_OOM_SCORE)
        log_as_json()
        name_in_log(os.environ[JOB_ID], int(os.environ[ATTEMPT]))
        return Birth(Path(arguments[0]), rank)
    prefer_for_oom_kill(SPARE_OOM_SCORE)
    log_as_json()
    with closing(socket.socket(fileno=int(arguments[1]))) as supervisor:
        supervisor.set_inheritable(False)
        begin = prepare(arguments[2])
        supervisor.sendall(READY)
        order, descriptors = _awaited(supervisor)
        begin()
        supervisor.sendall(TAKEN)
    prefer_for_oom_kill(ATTEMPT_OOM_SCORE)
    _log_into(order.log)
    name_in_log(order.job_id, order.attempt)
    return Birth(Path(order.workspace), given=dict(zip(order.given, descriptors, strict=True)))


def _awaited(supervisor: socket.socket) -> tuple[SpareOrder, list[int]]:
    """The order, and the descriptors that came with it. This process ends where the supervisor wants it no more."""
    data, descriptors = b"", list[int]()
    while not data.endswith(b"\n"):
        chunk, came, _, _ = socket.recv_fds(supervisor, ORDER_BYTES, MOST_DESCRIPTORS)
        if not chunk:
            _unwanted()
        data += chunk
        descriptors += came
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return SpareOrder.model_validate_json(data), descriptors


def _unwanted() -> NoReturn:
    os._exit(0)


def _log_into(path: str) -> None:
    """Let all that this process prints from now on go to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
