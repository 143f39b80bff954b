"""`python -P -m workers.child.host`: reads checkpoints in runtimes, one order a line, one answer a line.

It imports transformers once and forks for each order: an order finds everything imported and nothing of the orders
before it, and its death (llama.cpp ends its process where a file contradicts itself) is an answer. A hang is the
owner's to end, with this process. Nothing of another job is ever in its memory, since this process reads no file.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from app.limited.process import exit_words
from workers.runtimes.order import ReadAnswer, ReadOrder

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SLACK_BYTES = 2 << 30
"""Memory that is asked for and never touched: of thread stacks, and of allocators."""


def main() -> int:
    """Serve until the input ends."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    answers = os.dup(sys.stdout.fileno())
    # Whatever prints to standard output must not look like an answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import_all()
    for line in sys.stdin.buffer:
        os.write(answers, obey(line).model_dump_json().encode() + b"\n")
    return 0


def import_all() -> None:
    """Everything that an order needs and that takes long, where it is installed."""
    import torch  # noqa: PLC0415, F401
    import transformers  # noqa: PLC0415
    from transformers.models.llama import modeling_llama  # noqa: PLC0415, F401

    transformers.utils.logging.disable_progress_bar()
    with suppress(ImportError):
        import compressed_tensors  # noqa: PLC0415, F401


def obey(line: bytes) -> ReadAnswer:
    """The answer of a process that does what the order says, or that it died."""
    order = ReadOrder.model_validate_json(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(order, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    _end_strays()
    try:
        return ReadAnswer.model_validate_json(said)
    except ValueError:
        return ReadAnswer(problem=f"its process ended {exit_words(os.waitstatus_to_exitcode(status))}")


def _in_child(order: ReadOrder, writing: int) -> NoReturn:
    try:
        with suppress(AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        limit = order.memory_bytes + SLACK_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        log = os.open(order.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(Path(order.log).parent)
        answer = _read(order)
        os.write(writing, answer.model_dump_json().encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _read(order: ReadOrder) -> ReadAnswer:
    from workers.runtimes.readers import READERS  # noqa: PLC0415 - what this process has, it imports after the fork

    try:
        return READERS[order.runtime](order)
    except Exception as error:
        import traceback  # noqa: PLC0415

        traceback.print_exc(limit=-3)
        words = " ".join(str(error).split())
        return ReadAnswer(problem=f"{type(error).__name__}: {words}"[:2000])


def _end_strays() -> None:
    """Whatever an order has started and left behind."""
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    with suppress(OSError):
        for pid in own.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass


if __name__ == "__main__":
    sys.exit(main())
