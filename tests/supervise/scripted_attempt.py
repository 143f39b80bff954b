"""`python -m tests.supervise.scripted_attempt WORKSPACE [RANK]`: an attempt that does what `metadata.script` says.

A real process on the real lifeline, pipe and lock; only the computation is left out. Steps are separated by commas:

    block           report the next block as finished         progress:N      N progress events at once
    sleep:S         sleep                                     hang            go on for ever, deaf to everything
    file:NAME:TEXT  write a file of the checkpoint            raw:TEXT        write TEXT to the pipe as it is
    long:BYTES      write one line of this length             signal:NAME     send a signal to itself
    fail:CODE       report a failure, exit code 1             exit:CODE       end at once
    state:NAME:TEXT write a file of what is finished          finished        report what is: NAME:TEXT, sorted
    raise:NAME      raise that builtin exception              ignore-term     ignore SIGTERM
    once:STEP       only in the first attempt                 child           start a grandchild that sleeps
    log:EVENT       write a log line                          outside         a result that names a folder outside
    result          report the result, and go on              failed:CODE     report a failure, and go on
    environment     report the names of its variables         rank:N:STEP     only as this rank
    hold:BYTES      hold such memory                        confined:PORT   report what it may still do
    needs:BYTES     say that the job needs such memory      given           report what it reads from the warm child
    pid             report its process id and rank            lost:N          wait for rank N's end, which told
                                                                              its pid, and fail over it
A step is the first rank's unless `rank` says otherwise.
"""

import encodings.idna  # noqa: F401 - a connection wants it, and Python may lie where another user gets nothing from
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from app.domain.attempt_lines import ResultLine
from bitwright.errors import error_from_code
from bitwright.events import BlockEvent, LogEvent, ProgressEvent, Stage
from bitwright.report import Report
from tests.reports import QUALITY, report
from workers.child.attempt import take_lock
from workers.child.birth import born
from workers.child.exceptions import as_bitwright_error
from workers.child.lifeline import EXIT_FAILED, REPORT_FD, SILENCE_SECONDS, ReportPipe
from workers.disk.durable import replace_file
from workers.disk.orders import AttemptOrder

BLOCKS = 100


def main(arguments: list[str]) -> int:
    birth = born(arguments, lambda _: lambda: None)
    workspace, rank = birth.workspace, birth.rank
    pipe = ReportPipe()
    if rank == 0:
        take_lock(workspace / "lock", seconds=float(os.environ[SILENCE_SECONDS]) + 10)
    order = AttemptOrder.model_validate_json((workspace / "order.json").read_bytes())
    script = Script(order.renumbered(birth.given), workspace, rank, pipe)
    try:
        for step in order.request.metadata.get("script", "").split(","):
            script.do(step)
    except BaseException as error:
        pipe.fail(as_bitwright_error(error))
        return EXIT_FAILED
    if rank:
        return 0
    pipe.write(ResultLine(report=report_for(order), checkpoints={"native": "output/native"}))
    return 0


class Script:
    def __init__(self, order: AttemptOrder, workspace: Path, rank: int, pipe: ReportPipe) -> None:
        self.order, self.workspace, self.rank, self.pipe = order, workspace, rank, pipe
        self.blocks = 0

    def do(self, step: str) -> None:
        rank, step = step.split(":", 2)[1:] if step.startswith("rank:") else ("0", step)
        name, _, argument = step.partition(":")
        if name == "once" and self.order.attempt == 1:
            self.do(argument)
        elif name not in ("", "once") and self.rank == int(rank):
            STEPS[name](self, argument)

    def block(self, _: str) -> None:
        event = BlockEvent(index=self.blocks, total=BLOCKS, name=f"model.layers.{self.blocks}", seconds=0.1)
        self.pipe.write(event)
        self.blocks += 1

    def progress(self, count: str) -> None:
        for done in range(int(count)):
            self.pipe.write(ProgressEvent(stage=Stage.QUANTIZE, done=done + 1, total=int(count), unit="blocks"))

    def file(self, argument: str) -> None:
        name, _, text = argument.partition(":")
        path = self.workspace / "output" / "native" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def state(self, argument: str) -> None:
        name, _, text = argument.partition(":")
        path = self.workspace / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if text.startswith("/"):
            path.symlink_to(text)
        else:
            replace_file(path, text.encode())

    def finished(self, _: str) -> None:
        state = self.workspace / "state"
        files = sorted(path for path in state.rglob("*") if path.is_file())
        told = ",".join(f"{file.relative_to(state).as_posix()}:{file.read_text()}" for file in files)
        self.pipe.write(LogEvent(event="finished", fields={"files": told}))

    def raw(self, text: str) -> None:
        os.write(int(os.environ[REPORT_FD]), text.encode() + b"\n")

    def long(self, size: str) -> None:
        for _ in range(int(size) // 1024):
            os.write(int(os.environ[REPORT_FD]), b"x" * 1024)
        self.raw("")

    def hang(self, _: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.pipe.write(LogEvent(event="hanging"))
        while True:
            time.sleep(0.05)  # tests beside this one compute

    def fail(self, code: str) -> None:
        raise error_from_code(code, "as the script says")

    def result(self, _: str) -> None:
        self.pipe.write(ResultLine(report=report_for(self.order), checkpoints={"native": "output/native"}))

    def raise_(self, name: str) -> None:
        builtins = {"MemoryError": MemoryError, "ValueError": ValueError}
        raise builtins[name]("as the script says")

    def child(self, _: str) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.pipe.write(LogEvent(event="grandchild", fields={"pid": child.pid}))

    def needs(self, size: str) -> None:
        fields = {"host_memory_bytes": int(size), "device_memory_bytes": 0}
        self.pipe.write(LogEvent(event="memory_needed", fields=dict(fields)))

    def hold(self, size: str) -> None:
        self.held = bytearray(int(size))
        for place in range(0, len(self.held), 4096):
            self.held[place] = 1

    def confined(self, port: str) -> None:
        """Tells what this process may still do; `port` is one of a server outside."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        try:
            with socket.create_connection(("127.0.0.1", int(port)), 2):
                reached = "reached"
        except OSError as error:
            reached = type(error).__name__
        with socket.socketpair()[0]:
            pass
        fields: dict[str, str | int] = {
            **{"privileges": status["NoNewPrivs"].strip(), "user": os.getuid(), "groups": len(os.getgroups())},
            **{"reached": reached, "core": resource.getrlimit(resource.RLIMIT_CORE)[0]},
            **{"file": resource.getrlimit(resource.RLIMIT_FSIZE)[0]},
            **{"opens": resource.getrlimit(resource.RLIMIT_NOFILE)[0]},
            **{"home": os.environ.get("HOME", ""), "namespace": os.readlink("/proc/self/ns/net")},
        }
        self.pipe.write(LogEvent(event=f"confined_{self.rank}", fields=dict(fields)))

    def given(self, _: str) -> None:
        assert self.order.warm is not None
        os.write(self.order.warm.orders, b"asked\n")
        said = os.read(self.order.warm.answers, 100).decode()
        self.pipe.write(LogEvent(event="given", fields={"said": said}))

    def outside(self, _: str) -> None:
        self.pipe.write(ResultLine(report=report_for(self.order), checkpoints={"native": "../.."}))
        os._exit(0)

    def environment(self, _: str) -> None:
        names = sorted(name for name in os.environ)
        self.pipe.write(LogEvent(event="environment", fields={"names": json.dumps(names)}))

    def pid(self, _: str) -> None:
        self.pipe.write(LogEvent(event=f"rank_{self.rank}", fields={"pid": os.getpid()}))
        take_lock(self.workspace / f".rank-{self.rank}", seconds=0)
        (self.workspace / f".rank-{self.rank}").rename(self.workspace / f"rank-{self.rank}")

    def lost(self, rank: str) -> None:
        while not (self.workspace / f"rank-{rank}").exists():
            time.sleep(0.01)
        take_lock(self.workspace / f"rank-{rank}", seconds=600)
        raise RuntimeError("connection closed by peer")


STEPS: dict[str, Callable[[Script, str], object]] = {
    "block": Script.block,
    "progress": Script.progress,
    "sleep": lambda _, seconds: time.sleep(float(seconds)),
    "file": Script.file,
    "state": Script.state,
    "finished": Script.finished,
    "raw": Script.raw,
    "long": Script.long,
    "hang": Script.hang,
    "signal": lambda _, name: os.kill(os.getpid(), signal.Signals[name]),
    "fail": Script.fail,
    "failed": lambda script, code: script.pipe.fail(error_from_code(code, "as the script says")),
    "result": Script.result,
    "raise": Script.raise_,
    "exit": lambda _, code: os._exit(int(code)),
    "ignore-term": lambda _, __: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "child": Script.child,
    "environment": Script.environment,
    "outside": Script.outside,
    "needs": Script.needs,
    "given": Script.given,
    "hold": Script.hold,
    "confined": Script.confined,
    "pid": Script.pid,
    "lost": Script.lost,
    "log": lambda _, event: structlog.get_logger("script").info(event),
}


def report_for(order: AttemptOrder) -> Report:
    """A report whose quality is known: perplexity 10 before and 12 after."""
    return report(quality=QUALITY if order.request.evaluation else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
