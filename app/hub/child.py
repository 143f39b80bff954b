"""`python -m app.hub.child`: looks at repositories on the Hub for an API, which asks by lines on standard input.

The only process of the API with network access beyond its own stores: it has the Hub's token, and no other secret. It
asks the configured endpoint alone for a model's file list, configuration and index, within limits of time, bytes and
memory, and ends at the end of its input, which is the API's.
"""

import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from app.domain.inputs.inspection import inspect_checkpoint
from app.hub.answers import renamed
from app.hub.looks import LOOK_BYTES, LOOK_SECONDS, LOOKS_AT_ONCE, Answer, Found, Opening, Question
from app.hub.repository import HUB, Allowance, HubFiles, HubReader
from bitwright.errors import BitwrightError, InputError, InternalError
from bitwright.events import ErrorData

KEPT = 256
"""Commits whose answer is kept."""
MEMORY = 4 << 30
"""Address space; four indexes of 64 MB as Python's objects take half of it."""
COMMIT_LENGTH = 40
Answers = tuple[Found | None, ErrorData | None]


def main() -> None:
    """Answer questions until the input ends; whoever asked is gone then, and so is any use of an answer."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    lines, lock = sys.stdin.buffer, threading.Lock()
    opening = Opening.model_validate_json(lines.readline())

    def say(answer: Answer) -> None:
        with lock, suppress(BrokenPipeError):
            sys.stdout.buffer.write(answer.model_dump_json().encode() + b"\n")
            sys.stdout.buffer.flush()

    with httpx.Client() as client:
        answer_all(lines, Looks(client, opening), say)
        os._exit(0)  # threads may still wait for the Hub


def answer_all(lines: Iterable[bytes], looks: "Looks", say: Callable[[Answer], None]) -> None:
    """Give an answer to each line of `lines`, some at once, in any order."""
    pool = ThreadPoolExecutor(LOOKS_AT_ONCE)

    def answer(question: Question) -> None:
        say(looks.answer(question))

    for line in lines:
        pool.submit(answer, Question.model_validate_json(line))
    pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Looks:
    """Looks at one Hub; answers of a commit are kept, since it never changes."""

    client: httpx.Client
    opening: Opening
    _kept: OrderedDict[tuple[str, str, bool], Answers] = field(default_factory=OrderedDict)

    def answer(self, question: Question) -> Answer:
        """The repository as the Hub has it, or an error; never raises."""
        try:
            return self._answer(question)
        except BitwrightError as error:
            return Answer(number=question.number, error=ErrorData.of(error))
        except Exception as error:
            cause = InternalError(f"{type(error).__name__} while looking at the Hub")
            return Answer(number=question.number, error=ErrorData.of(cause))

    def _answer(self, question: Question) -> Answer:
        kept = self._kept.get((question.id, question.revision, question.any_type))
        if kept is not None and len(question.revision) == COMMIT_LENGTH:
            return Answer(number=question.number, found=kept[0], error=kept[1])
        allowance = Allowance(LOOK_SECONDS, LOOK_BYTES)
        reader = HubReader(self.client, allowance, self.opening.endpoint or HUB, self.opening.token)
        repository = reader.repository(question.id, question.revision)
        key = (question.id, repository.commit, question.any_type)
        if key not in self._kept:
            self._kept[key] = _judged(HubFiles(reader, repository), question.any_type)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        found, error = self._kept[key]
        return Answer(number=question.number, found=found, error=error, renamed=renamed(question.id, repository.id))


def _judged(files: HubFiles, any_type: bool) -> Answers:
    """The checkpoint, or what is wrong with it; raises what is wrong with the Hub, which may pass."""
    try:
        return Found.of(inspect_checkpoint(files, any_type=any_type, headers=False)), None
    except InputError as error:
        return None, ErrorData.of(error)


if __name__ == "__main__":
    main()
