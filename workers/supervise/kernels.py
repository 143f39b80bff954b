"""Compiled loops of this version of the code, made once by a child of the worker; each attempt gets a copy of its own.

No attempt writes where another one reads: what an attempt compiles besides is in its own folder, and goes with it.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import structlog

from workers.supervise.child_env import TEXTS, kernel_environment, kernels_in
from workers.supervise.child_process import ChildProcess
from workers.supervise.spares.stamp import stamp

MODULE = "workers.child.kernels"
UNUSED_SECONDS = 30 * 86_400.0
"""A version's folder that nobody has taken a copy of for so long is removed."""

log = structlog.get_logger(__name__)


class Kernels:
    """The folder of a version's compiled loops, and the child that fills it. For the thread that runs jobs alone."""

    def __init__(self, root: Path, silence_seconds: float) -> None:
        self._root, self._silence = root, silence_seconds
        self._folder = root / stamp({})[:16]
        self._child: ChildProcess | None = None
        self._given_up = False

    @property
    def ready(self) -> bool:
        """True where there is something to give."""
        return self._folder.is_dir()

    @property
    def builtin_text(self) -> Path:
        """The file with the builtin text, once it is there."""
        return self._folder / TEXTS

    def tend(self) -> None:
        """Start the child if the folder is not there, and take over what it made. Takes some milliseconds."""
        if self._child is not None and self._child.ended():
            self._take_over()
        elif self._child is None and not self._given_up and not self.ready:
            self._start()

    def give(self, folder: Path) -> None:
        """Copy what there is to the place where a process with `folder` for its own looks for it."""
        if self.ready:
            with suppress(OSError):
                os.utime(self._folder)
                shutil.copytree(self._folder, kernels_in(folder), dirs_exist_ok=True)

    def close(self) -> None:
        """End the child. Safe to call twice."""
        self._given_up = True
        if self._child is not None:
            self._child.finish(0)
            self._end()

    def _start(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._forget_old()
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir()
            self._child = ChildProcess(
                [MODULE],
                environment=kernel_environment(self._staging),
                log_path=self._staging / "log",
                silence_seconds=self._silence,
            )
        except OSError as error:
            self._given_up = True
            log.warning("kernels_not_compiled", error=type(error).__name__)

    def _take_over(self) -> None:
        assert self._child is not None  # noqa: S101 (asked by the caller)
        code = self._child.finish(0)
        if code == 0:
            with suppress(OSError):  # another worker was first
                (self._staging / "log").unlink()
                self._staging.rename(self._folder)
            log.info("kernels_compiled")
        else:
            self._given_up = True
            log.warning("kernels_not_compiled", code=code)
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.__exit__()
        shutil.rmtree(self._staging, ignore_errors=True)

    def _forget_old(self) -> None:
        for entry in os.scandir(self._root):
            with suppress(OSError):
                if entry.is_dir() and time.time() - entry.stat().st_mtime > UNUSED_SECONDS:
                    shutil.rmtree(entry.path, ignore_errors=True)

    @property
    def _staging(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}.{os.getpid()}")
