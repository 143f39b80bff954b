"""A reader at work: one shell and one Python for a document, in one folder, from its first block to its last."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.documents.blocks import FILES, SHELLS, Block

SECONDS = 300.0
"""The longest that a block may take."""

PYTHON_DRIVER = """
import runpy, sys, traceback
names = {}
for line in sys.stdin:
    path, status = line.rstrip("\\n").split("\\t")
    code = 0
    try:
        names = runpy.run_path(path, init_globals=names)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    with open(status + ".new", "w") as file:
        file.write(str(code))
    import os
    os.replace(status + ".new", status)
"""


class BlockFailed(AssertionError):
    """A block did not do what it says."""


class Interpreter:
    """A process that runs one file after another and keeps what they define."""

    def __init__(self, command: list[str], line: str, folder: Path, environment: Mapping[str, str], log: Path) -> None:
        self._line = line
        self._folder = folder
        self._log = log
        self._steps = 0
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
                start_new_session=True,
            )

    def run(self, text: str, seconds: float = SECONDS) -> str:
        """Output of the text.

        Raises:
            BlockFailed: it ended with an error, or not in time.
        """
        self._steps += 1
        step = self._log.with_suffix(f".{self._steps}.step")
        status, before = self._log.with_suffix(f".{self._steps}.status"), self._log.stat().st_size
        step.write_text(text, encoding="utf-8")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write((self._line.format(step=step, status=status) + "\n").encode())
            self._process.stdin.flush()
        deadline = time.monotonic() + seconds
        while not status.exists() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        told = self._log.read_bytes()[before:].decode(errors="replace")
        if not status.exists():
            why = "ended the interpreter" if self._process.poll() is not None else f"took more than {seconds:.0f} s"
            raise BlockFailed(f"{text}\n{why}; it printed:\n{told[-6000:]}")
        if (code := status.read_text().strip()) != "0":
            raise BlockFailed(f"{text}\nended with {code}; it printed:\n{told[-6000:]}")
        return told

    def close(self) -> None:
        """End it and everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


class Session:
    """Runs the blocks of one document in order, each once.

    placeholders   what a reader would replace, and by what
    """

    def __init__(
        self, blocks: list[Block], folder: Path, environment: Mapping[str, str], placeholders: Mapping[str, str]
    ) -> None:
        self._blocks = blocks
        self._folder = folder
        self._environment = environment
        self._placeholders = placeholders
        self._interpreters: dict[str, Interpreter] = {}
        self._done: dict[int, BlockFailed | None] = {}

    def reach(self, block: Block) -> None:
        """Run the block, after those before it that have not run yet; slow ones only before a slow one.

        Raises:
            BlockFailed: it fails, or one before it has.
        """
        for earlier in self._blocks:
            if earlier.line > block.line:
                break
            wanted = earlier.runs and (earlier.slow is None or block.slow is not None)
            if wanted and earlier.line not in self._done:
                self._done[earlier.line] = self._try(earlier)
            failed = self._done.get(earlier.line)
            if failed is not None:
                raise BlockFailed(f"{earlier.name}: {failed}") from failed

    def reach_end(self) -> None:
        """Run all blocks but the slow ones.

        Raises:
            BlockFailed: one fails, or has.
        """
        for block in self._blocks:
            if block.runs and block.slow is None:
                self.reach(block)

    def _try(self, block: Block) -> BlockFailed | None:
        try:
            self._run(block)
        except BlockFailed as failed:
            return failed
        return None

    def _run(self, block: Block) -> None:
        text = block.text
        for placeholder, value in self._placeholders.items():
            text = text.replace(placeholder, value)
        if block.language in FILES:
            self._write(text)
        elif block.language in SHELLS:
            self._shell().run(as_typed(text))
        else:
            self._python().run(text)

    def _write(self, text: str) -> None:
        """Put a file where its first line says, with ids that the shell knows in place of the example's."""
        named = re.match(r"# ([\w.-]+)\n", text)
        if named is None:
            return
        if upload := re.search(r"upl_[0-9a-z]{26}", text):
            text = text.replace(upload[0], self._shell().run('printf %s "$UPLOAD"'))
        (self._folder / named[1]).write_text(text, encoding="utf-8")

    def _shell(self) -> Interpreter:
        if "shell" not in self._interpreters:
            command = ["bash", "--noprofile", "--norc", "-euo", "pipefail"]
            line = "source '{step}' < /dev/null; echo $? > '{status}.new'; mv '{status}.new' '{status}'"
            self._interpreters["shell"] = self._open(command, line, "shell")
        return self._interpreters["shell"]

    def _python(self) -> Interpreter:
        if "python" not in self._interpreters:
            self._interpreters["python"] = self._open(
                [sys.executable, "-c", PYTHON_DRIVER], "{step}\t{status}", "python"
            )
        return self._interpreters["python"]

    def _open(self, command: list[str], line: str, name: str) -> Interpreter:
        return Interpreter(command, line, self._folder, self._environment, self._folder.parent / f"{name}.log")

    def close(self) -> None:
        """End what runs."""
        for interpreter in self._interpreters.values():
            interpreter.close()


def as_typed(text: str) -> str:
    """A shell block as its commands: of a console session without prompts and answers, and without `serve`.

    The service of the tests runs already, and a second one on its data folder would be refused.
    """
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith(("$ ", "> "))]
    return "\n".join(":" if re.match(r"bitwright serve\b", line) else line for line in lines) + "\n"
