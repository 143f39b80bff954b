"""Checkpoints read by the runtimes that the worker has, each by a limited child: whatever happens to it is a result."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from app.domain.runtimes import Runtime
from app.limited.limits import Ended, Limits, last_lines
from app.limited.process import Handle, LimitedProcess
from bitwright.report import LoadReport, WrittenText
from workers.disk.orders import AttemptOrder
from workers.engine.loads_here.checks import Check, Probe
from workers.engine.loads_here.comparison import distance, read_logits
from workers.machine import host_memory
from workers.runtimes import in_vllm
from workers.runtimes.order import FILE_BYTES, HOST, ReadAnswer, ReadOrder

SECONDS, SECONDS_OF_VLLM = 120.0, 300.0
SECONDS_PER_GB = 60.0
"""More for a checkpoint of that size: to map it, unpack it and write a few tokens."""
MEMORY_BYTES, UNPACKED = 4 << 30, 12
"""That a runtime may take, and besides so many times the size of the files: two bits become sixteen, and there are
copies for a while."""
HOST_SHARE = 0.9
"""Of the machine's memory, the most that it may take."""
KILLED = "by SIGKILL"


class Reading:
    """The children of an attempt that read, and the folder for what they write."""

    def __init__(self, order: AttemptOrder, folder: Path) -> None:
        self._folder = folder
        warm = order.warm
        self._child = None if warm is None else LimitedProcess(Handle(warm.orders, warm.answers, warm.pid))
        self._own = False
        self._count = 0

    def warm_up(self) -> None:
        """Start the child that reads in transformers, which takes seconds to be ready, if none waits."""
        if self._child is None or not self._child.usable:
            self._child = LimitedProcess.start(HOST, folder=self._folder, file_bytes=FILE_BYTES)
            self._own = True

    def close(self) -> None:
        """End what this attempt has started."""
        if self._child is not None and self._own:
            self._child.close()

    def read(
        self,
        check: Check,
        folder: Path,
        probe: Probe,
        expected: Tensor | None,
        *,
        level: Literal["block", "files"],
        base: Path | None = None,
        tokens: int = 0,
        looser: float = 1.0,
        words: Callable[[tuple[int, ...]], WrittenText | None] | None = None,
    ) -> LoadReport:
        """Let a runtime load a checkpoint and compare its logits with those expected: fp32 (tokens, vocabulary).

        base       of an adapter
        expected   None: what it computes is held against nothing
        tokens     that it writes
        looser     times so far as usual logits may be off
        words      the text of the tokens that it wrote
        """
        started = time.perf_counter()
        self._count += 1
        place = self._folder / f"read-{self._count}"
        place.mkdir(parents=True, exist_ok=True)
        order = ReadOrder(
            runtime=check.runtime,
            folder=str(folder),
            base=None if base is None else str(base),
            ids=tuple(probe.ids[0].tolist()),
            text=probe.text,
            tokens=tokens,
            logits=str(place / "logits"),
            log=str(place / "log"),
            memory_bytes=_memory(folder, base),
            place=check.where.place,
        )
        size = _size(folder, base)
        answer, log = self._answer(check, order, size)
        if KILLED in answer.problem:
            # By a kernel without memory, perhaps, to which this child is the first to go: that is no word of a runtime.
            answer, log = self._answer(check, order, size)
        verdict = _judged(looser * check.close, answer, order, expected)
        shutil.rmtree(place, ignore_errors=True)
        said = _words(log, verdict.problem).replace(f"{self._folder.parent}/", "")
        return LoadReport(
            format=check.format.value,
            runtime=check.runtime.value,
            version=answer.version or check.where.version,
            read=level,
            result=verdict.result,
            detail=last_lines(said) or None,
            difference=verdict.difference,
            tokens_written=len(answer.written) if tokens else None,
            written=None if words is None or answer.problem else words(answer.written),
            seconds=time.perf_counter() - started,
        )

    def written_by(self, folder: Path, probe: Probe, tokens: int) -> tuple[int, ...]:
        """The tokens that a model writes in transformers after the probe; none where it cannot be loaded so."""
        self._count += 1
        place = self._folder / f"read-{self._count}"
        place.mkdir(parents=True, exist_ok=True)
        order = ReadOrder(
            runtime=Runtime.TRANSFORMERS,
            folder=str(folder),
            ids=tuple(probe.ids[0].tolist()),
            tokens=tokens,
            logits=str(place / "logits"),
            log=str(place / "log"),
            memory_bytes=_memory(folder, None),
        )
        answer, _ = self._answer(None, order, _size(folder, None))
        shutil.rmtree(place, ignore_errors=True)
        return () if answer.problem else answer.written

    def _answer(self, check: Check | None, order: ReadOrder, size: int) -> tuple[ReadAnswer, str]:
        """The answer, an answer in place of one that never came, and the log; without a check, of the source."""
        is_vllm = check is not None and check.runtime is Runtime.VLLM
        seconds = (SECONDS_OF_VLLM if is_vllm else SECONDS) + SECONDS_PER_GB * size / 1e9
        limits = Limits(seconds=seconds, memory_bytes=order.memory_bytes)
        log = Path(order.log)
        if is_vllm:
            command = (order.place or "", "-I", str(Path(in_vllm.__file__)))
            log = log.parent / "child.log"
            with LimitedProcess.start(command, folder=log.parent, file_bytes=FILE_BYTES) as child:
                outcome = child.ask(order.model_dump_json().encode(), limits)
        else:
            self.warm_up()
            assert self._child is not None  # noqa: S101 - for the type checker
            outcome = self._child.ask(order.model_dump_json().encode(), limits)
        said = _tail(log)
        if outcome.ended is not Ended.ANSWERED:
            return ReadAnswer(problem=outcome.words), said
        try:
            return ReadAnswer.model_validate_json(outcome.answer), said
        except ValueError:
            return ReadAnswer(problem="its answer is not understood"), said


@dataclass(frozen=True)
class _Verdict:
    """On an answer: its problem, empty if there is none, and how far its logits are off, where that is a number."""

    problem: str = ""
    result: Literal["loads", "does_not_load", "differs"] = "loads"
    difference: float | None = None


def _judged(close: float, answer: ReadAnswer, order: ReadOrder, expected: Tensor | None) -> _Verdict:
    if answer.problem:
        return _Verdict(answer.problem, "does_not_load")
    try:
        data = Path(order.logits).read_bytes()
    except OSError:
        data = b""
    logits = read_logits(data, len(order.ids), answer.vocabulary)
    if logits is None:
        words = f"it gives {len(data)} bytes of logits for {len(order.ids)} tokens of {answer.vocabulary}"
        return _Verdict(words, "does_not_load")
    if order.tokens and len(answer.written) != order.tokens:
        return _Verdict(f"it wrote {len(answer.written)} tokens of {order.tokens}", "does_not_load")
    if expected is None:
        return _Verdict()
    if logits.shape != expected.shape:
        return _Verdict(f"it knows {logits.shape[1]} tokens, and the model {expected.shape[1]}", "differs")
    apart = distance(expected, logits)
    if not math.isfinite(apart.overall):
        return _Verdict("it loads the files, and its logits are not finite", "differs")
    if apart.is_rounding(close):
        return _Verdict(difference=apart.overall)
    words = (
        f"it loads the files and computes another model: its logits differ from the engine's by {apart.overall:.3g} "
        f"standard deviations, those of the median token by {apart.typical:.3g}; rounding makes {close:g} at the most"
    )
    return _Verdict(words, "differs", apart.overall)


def _words(log: str, problem: str) -> str:
    """The end of a log and the problem, which may be its end already; nothing if there is no problem."""
    if not problem:
        return ""
    return log if "".join(problem.split())[:200] in "".join(log.split()) else f"{log}\n{problem}"


def _size(folder: Path, base: Path | None) -> int:
    folders: Sequence[Path] = [folder] if base is None else [folder, base]
    return sum(file.stat().st_size for each in folders for file in each.rglob("*") if file.is_file())


def _memory(folder: Path, base: Path | None) -> int:
    return int(min(HOST_SHARE * host_memory(), MEMORY_BYTES + UNPACKED * _size(folder, base)))


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 8192))
            return last_lines(stream.read().decode(errors="replace"), 1600)
    except OSError:
        return ""
