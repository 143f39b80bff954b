"""`python -P -m workers.child.host`: reads what strangers sent, one order a line, one answer a line.

Checkpoints in runtimes (`workers.runtimes`), and the configuration, tokenizer and texts of a job
(`workers.engine.untrusted`). It imports transformers once and forks for each order: an order finds everything imported
and nothing of the orders before it, and its death (llama.cpp ends its process where a file contradicts itself) is an
answer. So is a job's input that takes too long or too much memory. A runtime that hangs is the owner's to end, with
this process. Nothing of another job is ever in its memory, since this process reads no file.
"""

import ctypes
import gc
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter

from app.limited.own_limits import limit_memory
from app.limited.process import exit_words
from bitwright.errors import BitwrightError, CorruptCheckpoint, OutOfMemory, OverLimit
from bitwright.events import ErrorData, Message
from workers.child.exceptions import as_bitwright_error
from workers.engine.untrusted.lines import InputAnswer, InputOrder
from workers.runtimes.order import ReadAnswer, ReadOrder

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SLACK_BYTES = 2 << 30
"""Memory that is asked for and never touched: of thread stacks, and of allocators."""
FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
"""A library's own, and no want of memory or time."""
LOG = "input.log"
PANIC = "PanicException"
"""A library's own kind, of no other: what Rust raises where it gives up."""

ORDERS: TypeAdapter[ReadOrder | InputOrder] = TypeAdapter(ReadOrder | InputOrder)


def main() -> int:
    """Serve until the input ends."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    answers = os.dup(sys.stdout.fileno())
    # Whatever prints to standard output must not look like an answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import_all()
    gc.collect()
    gc.freeze()  # else each collection of a forked process would copy all that it shares with this one
    for line in sys.stdin.buffer:
        os.write(answers, obey(line).model_dump_json().encode() + b"\n")
    return 0


def import_all() -> None:
    """Everything that an order needs and that takes long, where it is installed."""
    import torch  # noqa: PLC0415, F401
    import transformers  # noqa: PLC0415
    from transformers.models.llama import modeling_llama  # noqa: PLC0415, F401

    from workers.engine.untrusted import reading  # noqa: PLC0415, F401

    transformers.utils.logging.disable_progress_bar()
    with suppress(ImportError):
        import compressed_tensors  # noqa: PLC0415, F401


def obey(line: bytes) -> Message | ReadAnswer:
    """The answer of a process that does what the order says, or that it died."""
    order = ORDERS.validate_json(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(order, writing)
    os.close(writing)
    seconds = order.seconds if isinstance(order, InputOrder) else None
    with os.fdopen(reading, "rb") as stream:
        said, late = _said(stream.fileno(), seconds)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    _end_strays()
    code = os.waitstatus_to_exitcode(status)
    if isinstance(order, ReadOrder):
        try:
            return ReadAnswer.model_validate_json(said)
        except ValueError:
            return ReadAnswer(problem=f"its process ended {exit_words(code)}")
    try:
        return InputAnswer.model_validate_json(said)
    except ValueError:
        return InputAnswer(error=ErrorData.of(_end_of_input(order, code, late=late)))


def _said(descriptor: int, seconds: float | None) -> tuple[bytes, bool]:
    """All that a process has written when it ends, and whether it did not end in time; None: it has all of it."""
    until, data = None if seconds is None else time.monotonic() + seconds, b""
    while True:
        left = None if until is None else until - time.monotonic()
        if left is not None and (left <= 0 or not select.select([descriptor], [], [], left)[0]):
            return b"", True
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return data, False
        data += chunk


def _end_of_input(order: InputOrder, code: int, *, late: bool) -> BitwrightError:
    """The error of a process that read a part of a job's input and ended without a word."""
    what = "the model's configuration and tokenizer" if order.part == "model" else "the job's texts"
    if late:
        hint = "look for a chat template or a tokenizer that does not end; or give shorter texts"
        detail = f"to read {what} takes longer than {order.seconds:g} seconds"
        return OverLimit(detail, field=_field(order), value=order.seconds, hint=hint)
    if -code in FAULTS:
        return CorruptCheckpoint(f"a library ended {exit_words(code)} while it read {what}", field=_field(order))
    return _too_much_memory(order)


def _too_much_memory(order: InputOrder) -> OverLimit:
    what = "the model's configuration and tokenizer" if order.part == "model" else "the job's texts"
    hint = "look for numbers of config.json, or rules of the tokenizer, that multiply; or give shorter texts"
    detail = f"to read {what} takes more than {order.memory_bytes >> 20} MiB of memory"
    return OverLimit(detail, field=_field(order), value=order.memory_bytes, hint=hint)


def _field(order: InputOrder) -> str:
    return "model" if order.part == "model" else "calibration.dataset"


def _in_child(order: ReadOrder | InputOrder, writing: int) -> NoReturn:
    try:
        with suppress(AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if isinstance(order, InputOrder):
            answer: Message | ReadAnswer = _input(order)
        else:
            limit = order.memory_bytes + SLACK_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            _print_into(Path(order.log))
            answer = _read(order)
        data = answer.model_dump_json().encode()
        while data:
            data = data[os.write(writing, data) :]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _print_into(path: Path) -> None:
    """Let what this process prints go to the end of a file, and work beside it."""
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(path.parent)


def _input(order: InputOrder) -> InputAnswer:
    """The answer to an order: what was read, or what was wrong with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing was tokenized before the fork
    _print_into(Path(order.place) / LOG)
    limit_memory(order.memory_bytes)
    from workers.engine.untrusted.reading import read_part  # noqa: PLC0415 - imported before the fork

    try:
        return read_part(order)
    except BaseException as error:
        import traceback  # noqa: PLC0415

        traceback.print_exc(limit=-6)
        known = as_bitwright_error(error)
        if type(error).__name__ == PANIC:
            words = (str(error).splitlines() or [PANIC])[0][:300]
            known = CorruptCheckpoint(f"the tokenizers library gives up on the tokenizer: {words}", field="model")
        return InputAnswer(error=ErrorData.of(_too_much_memory(order) if isinstance(known, OutOfMemory) else known))


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
