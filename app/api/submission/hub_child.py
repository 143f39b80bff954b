"""The API's child that looks at the Hub: started when it is first asked, started again when it has died.

A request waits for it at most ten seconds, four at once; what is not known by then is left to the worker. The child
gets a clean environment, and the Hub's token by its first line; its input ends with this process, and it with that.
"""

import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import IO, Protocol

import structlog
from pydantic import ValidationError

from app.domain.request.sources import HubModel
from app.hub.environment import child_variables
from app.hub.looks import LOOK_SECONDS, LOOKS_AT_ONCE, Answer, Opening, Question
from app.settings import Settings

WAITING = 16
"""Requests that may wait for a turn; the rest goes on unchecked at once, or they would hold all threads of the API."""
ENDING_SECONDS = 2.0
KEPT_ANSWERS = 64
Asked = tuple[str, str, bool]
"""Repository, revision, and whether any type of model is asked for."""

log = structlog.get_logger(__name__)


class Looks(Protocol):
    """Anything that knows of repositories on the Hub."""

    def look(self, model: HubModel, *, any_type: bool) -> Answer | None:
        """The answer about a repository; None if there is none now."""
        ...


@dataclass(frozen=True)
class KnownLooks:
    """Answers that were given before; nobody is asked."""

    answers: Mapping[Asked, Answer]

    def look(self, model: HubModel, *, any_type: bool) -> Answer | None:
        """The latest answer about a repository; None if there was none."""
        return self.answers.get((model.id, model.revision, any_type))


class HubChild:
    """The child, for any thread to ask."""

    def __init__(self, settings: Settings, seconds: float = LOOK_SECONDS) -> None:
        token = None if settings.hub_token is None else settings.hub_token.get_secret_value()
        self._opening = Opening(endpoint=settings.hub_endpoint, token=token)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._turns, self._places = threading.Semaphore(LOOKS_AT_ONCE), threading.Semaphore(WAITING + LOOKS_AT_ONCE)
        self._numbers = count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: dict[int, Future[Answer]] = {}
        self._known: OrderedDict[Asked, Answer] = OrderedDict()

    @property
    def pid(self) -> int | None:
        """Of the child, if one was started."""
        return None if self._process is None else self._process.pid

    def look(self, model: HubModel, *, any_type: bool) -> Answer | None:
        """The answer about a repository; None if it does not come in time."""
        deadline = time.monotonic() + self._seconds
        if not self._places.acquire(blocking=False):
            return None
        try:
            if not self._turns.acquire(timeout=self._seconds):
                return None
            try:
                asked = Question(number=next(self._numbers), id=model.id, revision=model.revision, any_type=any_type)
                return self._keep(asked, self._ask(asked, deadline))
            finally:
                self._turns.release()
        finally:
            self._places.release()

    def known_only(self) -> KnownLooks:
        """The answers of late, for whoever must not ask the Hub each time."""
        with self._lock:
            return KnownLooks(dict(self._known))

    def _keep(self, question: Question, answer: Answer | None) -> Answer | None:
        if answer is not None and answer.found is not None:
            with self._lock:
                self._known[question.id, question.revision, question.any_type] = answer
                self._known.move_to_end((question.id, question.revision, question.any_type))
                while len(self._known) > KEPT_ANSWERS:
                    self._known.popitem(last=False)
        return answer

    def close(self) -> None:
        """End the child."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        _forget(process)
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ask(self, question: Question, deadline: float) -> Answer | None:
        future: Future[Answer] = Future()
        try:
            with self._lock:
                self._asked[question.number] = future
                self._write(question)
            return future.result(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, CancelledError):
            return None
        except OSError as error:  # it died before the line was read
            log.warning("hub_child_lost", error=type(error).__name__)
            return None
        finally:
            self._asked.pop(question.number, None)

    def _write(self, question: Question) -> None:
        """One line to a child that lives; the lock is held."""
        if self._process is not None and self._process.poll() is not None:
            _forget(self._process)
            self._process = None
        if self._process is None:
            self._process = self._start()
        stdin = _input(self._process)
        stdin.write(question.model_dump_json().encode() + b"\n")
        stdin.flush()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app.hub.child"],
            env=child_variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the terminal is the API's, which ends its child
        )
        _input(process).write(self._opening.model_dump_json().encode() + b"\n")
        threading.Thread(target=self._listen, args=(process,), name="hub-child", daemon=True).start()
        log.info("hub_child_started", pid=process.pid)
        return process

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        """Hand out answers until the child has ended; then nobody who waits gets one."""
        if process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                try:
                    answer = Answer.model_validate_json(line)
                except ValidationError:
                    log.warning("hub_child_not_understood", size=len(line))
                    continue
                future = self._asked.pop(answer.number, None)
                if future is not None:
                    future.set_result(answer)
        process.wait()
        with self._lock:
            replaced = self._process is not None and self._process is not process
            waiting = [] if replaced else list(self._asked.values())
        for future in waiting:
            future.cancel()


def _forget(process: "subprocess.Popen[bytes]") -> None:
    with suppress(OSError):  # what it has not read is of no use
        _input(process).close()


def _input(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    if process.stdin is None:
        raise OSError("the child has no input")
    return process.stdin
