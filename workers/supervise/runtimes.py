"""The runtimes that a worker has to read results in, and the child that waits for it, with transformers imported.

Neither imports one: versions are in the packages' metadata, and vLLM's environment is asked by its own Python.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog

from app.domain.runtimes import Runtime
from app.limited.environment import limited_environment
from app.limited.process import LimitedProcess
from app.settings import Settings
from workers.disk.orders import RuntimePlace, WarmChild
from workers.runtimes.libraries import library_version
from workers.runtimes.order import FILE_BYTES, HOST

PACKAGES = {Runtime.TRANSFORMERS: "transformers", Runtime.PEFT: "peft"}
PROBE = "from importlib.metadata import version; print(version('vllm'))"
PROBE_SECONDS = 60.0
FOLDER = "reading"
"""In the folder of workspaces: the child's log and caches; what belongs to a job is in the job's own workspace."""

log = structlog.get_logger(__name__)


def found_runtimes(settings: Settings) -> dict[str, RuntimePlace]:
    """Name -> release and place of every runtime on this machine; one that is named and not there is logged."""
    found = dict[str, RuntimePlace]()
    for runtime, package in PACKAGES.items():
        try:
            found[runtime.value] = RuntimePlace(version=version(package))
        except PackageNotFoundError:
            continue
    if settings.llama_cpp is not None:
        release = library_version(settings.llama_cpp)
        if release is None:
            log.warning("runtime_missing", runtime=Runtime.LLAMA_CPP.value, place=str(settings.llama_cpp))
        else:
            found[Runtime.LLAMA_CPP.value] = RuntimePlace(version=release, place=str(settings.llama_cpp))
    if settings.vllm_python is not None:
        release = _vllm_version(settings.vllm_python, settings.workspace_dir / FOLDER)
        if release is None:
            log.warning("runtime_missing", runtime=Runtime.VLLM.value, place=str(settings.vllm_python))
        else:
            found[Runtime.VLLM.value] = RuntimePlace(version=release, place=str(settings.vllm_python))
    return found


def _vllm_version(python: Path, folder: Path) -> str | None:
    try:
        answer = subprocess.run(
            [str(python), "-I", "-c", PROBE],
            env=limited_environment(folder),
            capture_output=True,
            check=True,
            timeout=PROBE_SECONDS,
            text=True,
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return answer.stdout.strip() or None


class WarmReader:
    """A limited child that reads results in runtimes (`workers.child.host`), lent to one attempt after another.

    It is started when the first attempt wants it, and imports what it needs while that opens its model; where a worker
    has spares, it waits beside them. An attempt that ended badly may have left it with an order: then the next one gets
    another.
    """

    def __init__(self, workspaces: Path, user: int | None = None) -> None:
        """user   that the child goes on as; None: this process's own"""
        self._folder = workspaces / FOLDER
        self._user = user or 0
        self._child: LimitedProcess | None = None

    def start(self) -> LimitedProcess:
        """The child; started now unless there is one that takes orders."""
        if self._child is None or not self._child.usable:
            self.close()
            self._child = LimitedProcess.start(HOST, folder=self._folder, file_bytes=FILE_BYTES, user=self._user)
            log.info("reader_started", pid=self._child.handle.pid)
        return self._child

    @contextmanager
    def lent(self) -> Iterator[WarmChild]:
        """The child's pipes, for a process that is started while the context lasts."""
        handle = self.start().handle
        try:
            yield WarmChild(orders=handle.orders, answers=handle.answers, pid=handle.pid)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child. Safe to call if there is none."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
