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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter

from app.limited.own_limits import limit_memory
from app.limited.process import exit_words
from app.many_imports import many_imports
from bitwright.errors import BitwrightError, CorruptCheckpoint, OutOfMemory, OverLimit
from bitwright.events import ErrorData, Message
from workers.child.exceptions import as_bitwright_error
from workers.child.preparation import NOT_NEEDED
from workers.disk.input_orders import InputAnswer, InputOrder
from workers.runtimes.order import ReadAnswer, ReadOrder

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SLACK_BYTES = 2 << 30
"""Memory that is asked for and never touched: of thread stacks, and of allocators."""
FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
"""A library's own, and no want of memory or time."""
LOG = "input.log"
MODEL, TEXTS = "the model's configuration", "the model's tokenizer and the job's texts"
"""Parts of a job's input, in words."""
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
    # What is imported stays out of collections: else each one of a forked process would copy what it shares with this.
    with many_imports(NOT_NEEDED):
        import_all()
        gc.collect()
    for line in sys.stdin.buffer:
        for answer in obey(line):
            os.write(answers, answer.model_dump_json().encode() + b"\n")
    return 0


def import_all() -> None:
    """Everything that an order needs and that takes long, where it is installed."""
    import torch  # noqa: PLC0415, F401
    import transformers  # noqa: PLC0415
    from transformers.models.llama import modeling_llama  # noqa: PLC0415, F401

    from workers.engine.untrusted import reading  # noqa: PLC0415, F401
    from workers.formats.library_config import know  # noqa: PLC0415

    know("llama")

    transformers.utils.logging.disable_progress_bar()
    with suppress(ImportError):
        import compressed_tensors  # noqa: PLC0415, F401


def obey(line: bytes) -> Iterator[Message | ReadAnswer]:
    """The answers of a process that does what the order says, as they come, or that it died."""
    order = ORDERS.validate_json(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(order, writing)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as stream:
        if isinstance(order, InputOrder):
            yield from _inputs(order, child, stream.fileno())
            return
        said = b"".join(iter(lambda: stream.read(1 << 16), b""))
    code = _buried(child)
    try:
        yield ReadAnswer.model_validate_json(said)
    except ValueError:
        yield ReadAnswer(problem=f"its process ended {exit_words(code)}")


def _inputs(order: InputOrder, child: int, descriptor: int) -> Iterator[InputAnswer]:
    """The answers of a process that reads a job's input: one for each part, until one is an error."""
    heard = b""
    for what, seconds in ((MODEL, order.seconds), (TEXTS, order.text_seconds)):
        until, late = time.monotonic() + seconds, False
        while b"\n" not in heard and not late:
            left = until - time.monotonic()
            late = left <= 0 or not select.select([descriptor], [], [], left)[0]
            chunk = b"" if late else os.read(descriptor, 1 << 16)
            if not chunk:
                break
            heard += chunk
        said, newline, heard = heard.partition(b"\n")
        if not newline:
            if late:
                os.kill(child, signal.SIGKILL)
            yield InputAnswer(error=ErrorData.of(_end_of_input(order, what, _buried(child), seconds if late else None)))
            return
        answer = InputAnswer.model_validate_json(said)
        if answer.error is not None or what == TEXTS:
            _buried(child)
        yield answer
        if answer.error is not None:
            return


def _buried(child: int) -> int:
    """The exit code of a process that ends, negative for a signal; what it leaves behind is ended, too."""
    _, status = os.waitpid(child, 0)
    _end_strays()
    return os.waitstatus_to_exitcode(status)


def _end_of_input(order: InputOrder, what: str, code: int, late: float | None) -> BitwrightError:
    """The error of a process that read a part of a job's input and ended without a word.

    late   seconds that it had, where it took longer
    """
    if late is not None:
        hint = "look for a chat template or a tokenizer that does not end; or give shorter texts"
        detail = f"to read {what} takes longer than {late:g} seconds"
        return OverLimit(detail, field="model", value=late, hint=hint)
    if -code in FAULTS:
        return CorruptCheckpoint(f"a library ended {exit_words(code)} while it read {what}", field="model")
    return _too_much_memory(order, what)


def _too_much_memory(order: InputOrder, what: str) -> OverLimit:
    hint = "look for numbers of config.json, or rules of the tokenizer, that multiply; or give shorter texts"
    detail = f"to read {what} takes more than {order.memory_bytes >> 20} MiB of memory"
    return OverLimit(detail, field="model", value=order.memory_bytes, hint=hint)


def _in_child(order: ReadOrder | InputOrder, writing: int) -> NoReturn:
    try:
        with suppress(AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if isinstance(order, InputOrder):
            for answer in _input(order):
                _write(writing, answer)
        else:
            limit = order.memory_bytes + SLACK_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            _print_into(Path(order.log))
            _write(writing, _read(order))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _write(descriptor: int, answer: Message | ReadAnswer) -> None:
    data = answer.model_dump_json().encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _print_into(path: Path) -> None:
    """Let what this process prints go to the end of a file, and work beside it."""
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(path.parent)


def _input(order: InputOrder) -> Iterator[InputAnswer]:
    """The answers to an order: what was read, or what was wrong with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing was tokenized before the fork
    _print_into(Path(order.place) / LOG)
    limit_memory(order.memory_bytes)
    from workers.engine.untrusted.reading import read_parts  # noqa: PLC0415 - imported before the fork

    what = MODEL
    try:
        for answer in read_parts(order):
            yield answer
            what = TEXTS
    except BaseException as error:
        import traceback  # noqa: PLC0415

        traceback.print_exc(limit=-6)
        known = as_bitwright_error(error)
        if type(error).__name__ == PANIC:
            words = (str(error).splitlines() or [PANIC])[0][:300]
            known = CorruptCheckpoint(f"the tokenizers library gives up on the tokenizer: {words}", field="model")
        known = _too_much_memory(order, what) if isinstance(known, OutOfMemory) else known
        yield InputAnswer(error=ErrorData.of(known))


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
