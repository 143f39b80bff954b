"""A job whose process is killed at given moments of its writes, and run again until it ends; one JSON line of facts.

    python -m tests.engine.quantize.killed_job MODEL WORKSPACE MOMENT ...

MOMENT is like before:3 or after:4: the attempt's third (fourth) file that becomes durable, just before (after) it does.
Attempts are forks of this process, which has only imported things: one import serves them all.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from app.domain.attempt_lines import AttemptLine
from bitwright.events import BlockEvent
from tests.engine.conftest import run_job
from workers.disk.durable import replace_file
from workers.engine import finished_blocks
from workers.engine.quantize.registry import METHODS

TUNED: dict[str, Any] = {"method": "signround", "bits": 3, "steps": 6, "batch_size": 4, "learning_rate": 0.05}


def main(model: Path, workspace: Path, moments: list[str]) -> None:
    log = workspace.with_name(workspace.name + ".log")
    endings = []
    for moment in [*moments, "never:0"]:
        pid = os.fork()
        if pid == 0:
            attempt(model, workspace, log, moment)
        endings.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    facts = [json.loads(line) for line in log.read_text().splitlines()]
    print(json.dumps({"endings": endings, "facts": facts}))  # noqa: T201


def attempt(model: Path, workspace: Path, log: Path, moment: str) -> None:
    """Runs the job in this process and ends it, by the kill or with 0."""
    try:
        watch(log, moment)
        lines = Lines(log, workspace / "state" / "state.json")
        run_job(model, workspace, lines, evaluation=None, **TUNED)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


class Lines(list[AttemptLine]):
    """Notes each block that is told of, and whether state.json names it by then."""

    def __init__(self, log: Path, state: Path) -> None:
        super().__init__()
        self._log, self._state = log, state

    def append(self, line: AttemptLine) -> None:
        if isinstance(line, BlockEvent):
            durable = [block["index"] for block in json.loads(self._state.read_bytes())["blocks"]]
            note(self._log, "told" if line.index in durable else "told too early", line.index)


def watch(log: Path, moment: str) -> None:
    """Notes where methods begin and end, and arranges for the kill."""
    method = METHODS["signround"]
    quantize_block = method.quantize_block
    when, _, number = moment.partition(":")
    written = 0

    def quantize(task: Any, spec: Any) -> Any:
        note(log, "begun", task.index)
        result = quantize_block(task, spec)
        note(log, "ended", task.index)
        return result

    def write(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if (when, written) == ("before", int(number)):
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(path, data)
        if (when, written) == ("after", int(number)):
            os.kill(os.getpid(), signal.SIGKILL)

    method.quantize_block = quantize  # type: ignore[method-assign]
    vars(finished_blocks)["replace_file"] = write


def note(log: Path, what: str, block: int) -> None:
    with log.open("a") as file:
        file.write(json.dumps([what, block]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
