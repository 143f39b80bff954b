"""`python -P -m app.inspection.child`: looks at checkpoints for an API, which gives it bytes of their files.

They come through a pipe: it opens no file, and has no network (`app.limited.launch`). Each look is a process of its
own, forked from this one, with limits of memory and processor time, so that nothing of one tenant's files is there when
another's are looked at; its death is a verdict. It ends at the end of its input, which is the API's.
"""

import gc
import json
import os
import resource
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

from app.domain.estimates import estimate
from app.domain.fit import can_do_without_model, misfits, warnings_of
from app.domain.inputs.inspection import CheckpointFiles, inspect_checkpoint
from app.domain.request.job_request import JobRequest
from app.inspection.lines import COUNT_BYTES, REFUSED, Look, Said, Verdict, Wanted
from app.limited.own_limits import limit_memory, limit_processor
from bitwright.errors import BitwrightError, InputError, InternalError, OverLimit
from bitwright.events import ErrorData

MOST_ORDER_BYTES = 16 << 20
HINT = "name the folder of one checkpoint; several small files are read faster than one whose header is large"


def main() -> int:
    """Serve until the input ends."""
    orders, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # whatever prints must not look like an answer
    rehearse()
    while True:
        line = read_line(orders)
        if not line:
            return 0
        child = os.fork()
        if child == 0:
            _in_child(line, orders, answers)
        _, status = os.waitpid(child, 0)
        if status:
            detail = "what looks at the checkpoint ended before it had judged it: it took too much memory or time"
            _say(answers, Said(verdict=Verdict(error=ErrorData.of(OverLimit(detail, field="model", hint=HINT)))))
            return 1  # bytes that it had asked for may be on their way


def read_line(descriptor: int) -> bytes:
    """An order, after which nothing comes until it is asked for; empty at the end of the input."""
    data = b""
    while not data.endswith(b"\n") and len(data) < MOST_ORDER_BYTES:
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return b""
        data += chunk
    return data


@dataclass(frozen=True)
class PipedFiles:
    """The files of a checkpoint whose bytes come through a pipe, one piece at a time."""

    sizes: dict[str, int]
    orders: int
    answers: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> Sequence[str]:
        """Of all files."""
        return sorted(self.sizes)

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return self.sizes[name]

    def read(self, name: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        data = bytearray(length)  # first: what has been asked for must be read
        with self.lock:
            _say(self.answers, Said(wanted=Wanted(name=name, start=start, length=length)))
            count = int.from_bytes(self._exactly(bytearray(COUNT_BYTES), COUNT_BYTES), "little")
            if count == REFUSED:
                os._exit(0)  # whoever has the file says why
            return self._exactly(data, count)

    def _exactly(self, data: bytearray, count: int) -> bytes:
        view = memoryview(data)[:count]
        while view:
            got = os.readv(self.orders, [view])
            if not got:
                os._exit(0)
            view = view[got:]
        return bytes(memoryview(data)[:count])


def judge(look: Look, files: CheckpointFiles) -> Verdict:
    """The verdict of a look; never raises what a checkpoint or a request causes."""
    try:
        inspection = inspect_checkpoint(files, any_type=can_do_without_model(look.request))
        problems = misfits(look.request, inspection)
        # Patterns and sizes that do not fit leave nothing to estimate.
        estimates = {} if problems else estimate(look.request, inspection)
        return Verdict(problems=problems, warnings=warnings_of(look.request, inspection), estimates=estimates)
    except InputError as error:
        return Verdict(error=ErrorData.of(error))
    except MemoryError:
        detail = f"to look at the checkpoint takes more than {look.memory_bytes >> 20} MiB of memory"
        return Verdict(error=ErrorData.of(OverLimit(detail, field="model", hint=HINT)))
    except BitwrightError as error:
        return Verdict(error=ErrorData.of(error))
    except Exception as error:
        return Verdict(error=ErrorData.of(InternalError(f"{type(error).__name__} while looking at the checkpoint")))


@dataclass(frozen=True)
class _Rehearsed:
    """A checkpoint of two tensors, for no tenant."""

    files: dict[str, bytes]

    def names(self) -> Sequence[str]:
        return sorted(self.files)

    def size(self, name: str) -> int:
        return len(self.files[name])

    def read(self, name: str, start: int, length: int) -> bytes:
        return self.files[name][start : start + length]


def rehearse() -> None:
    """Look once at a checkpoint of our own: what is built at the first look is there for all that are forked."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "llama", "vocab_size": 64, **sizes}
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(2)
    files = _Rehearsed({"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    request = JobRequest.parse({"model": "/m", "method": "rtn", "bits": 4})
    order = Look(request=request, sizes={}, memory_bytes=0, seconds=0)
    Said(verdict=judge(Look.model_validate_json(order.model_dump_json()), files)).model_dump_json()
    gc.collect()
    gc.freeze()  # else each collection of a forked process would copy all that it shares with this one


def _in_child(line: bytes, orders: int, answers: int) -> NoReturn:
    try:
        look = Look.model_validate_json(line)
        limit_memory(look.memory_bytes)
        limit_processor(look.seconds)
        _say(answers, Said(verdict=judge(look, PipedFiles(look.sizes, orders, answers))))
        os._exit(0)
    finally:
        os._exit(1)


def _say(answers: int, said: Said) -> None:
    data = said.model_dump_json().encode() + b"\n"
    while data:
        data = data[os.write(answers, data) :]


if __name__ == "__main__":
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
