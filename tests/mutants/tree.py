"""A copy of the repository with an environment of its own, in which tests meet a mistake."""

import os
import shutil
import signal
import site
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.documentation import ROOT

LEFT_OUT = (".git", ".venv*", ".cache", "build", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "data")


class Outcome(StrEnum):
    """Answer of the tests to a mistake."""

    NOTICED = "noticed"
    UNNOTICED = "unnoticed"
    ENDLESS = "endless"
    """The tests passed their time limit, which a person would notice."""


@dataclass(frozen=True)
class Tree:
    """A copy of the repository.

    folder        its root
    python        an interpreter that imports the copy, and every other package from this one's environment
    environment   variables for the tests, beside those of this process
    """

    folder: Path
    python: Path
    environment: Mapping[str, str]

    def run(self, tests: Sequence[str], seconds: float) -> Outcome:
        """Run tests until the first failure, at most so many seconds. No tests at all notice nothing."""
        if not tests:
            return Outcome.UNNOTICED
        command = [str(self.python), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", DEFAULT, *tests]
        # Their children, servers among them, end with the group.
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome.ENDLESS
        finally:
            stop(process)
        return Outcome.UNNOTICED if code == 0 else Outcome.NOTICED

    def collects(self, tests: Sequence[str]) -> bool:
        """True if pytest knows all of these tests, whose failures would otherwise say nothing."""
        command = [str(self.python), "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, **self.environment}
        return (
            subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=False).returncode == 0
        )

    def write(self, file: str, text: str) -> None:
        """Replace a source file's text."""
        (self.folder / file).write_text(text, encoding="utf-8")

    def restore(self, file: str) -> None:
        """Put the repository's text back."""
        shutil.copyfile(ROOT / file, self.folder / file)


DEFAULT = "not slow and not gpu and not vllm"
"""Tests of the default run."""


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_tree(folder: Path, environment: Mapping[str, str]) -> Tree:
    """A copy of the working tree with an environment of its own that shares this one's packages.

    Compiled files are checked by the source's hash, since a mistake may be as long as the right text and as old.
    """
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    own = folder / ".venv"
    venv.create(own, with_pip=False, symlinks=True)
    packages = next((own / "lib").glob("python*")) / "site-packages"
    shared = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
    (packages / "shared.pth").write_text("\n".join([str(folder), *shared]) + "\n")
    python = own / "bin" / "python"
    for script in ("lint-imports", "bitwright", "alembic"):
        lines = Path(sys.executable).with_name(script).read_text().splitlines(keepends=True)
        (own / "bin" / script).write_text(f"#!{python}\n" + "".join(lines[1:]))
        (own / "bin" / script).chmod(0o755)
    places = ["app", "bitwright", "workers", "migrations", "tests"]
    compiling = [str(python), "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *places]
    subprocess.run(compiling, cwd=folder, check=True)
    return Tree(folder, python, {**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""})
