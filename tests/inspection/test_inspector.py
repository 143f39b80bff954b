"""Looks at checkpoints in real children: limits, turns of tenants, and that each end leaves the next look a child."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.domain.estimates import estimate
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from app.domain.request.job_request import JobRequest
from app.inspection import inspector as module
from app.inspection.inspector import Inspector
from app.limited.limits import Limits
from bitwright.errors import TooManyRequests
from tests.api.checkpoints import write_checkpoint
from tests.supervise.bench import alive, wait_for

REQUEST = JobRequest.parse({"model": "/m", "method": "signround", "bits": 4})


@dataclass
class Slow:
    """Files whose reader waits for a word."""

    files: FolderFiles
    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def names(self) -> Sequence[str]:
        return self.files.names()

    def size(self, name: str) -> int:
        return self.files.size(name)

    def read(self, name: str, start: int, length: int) -> bytes:
        self.begun.set()
        assert self.go.wait(30)
        return self.files.read(name, start, length)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> FolderFiles:
    return FolderFiles(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    made = Inspector()
    yield made
    made.close()


def test_the_verdict_is_that_of_this_process(inspector: Inspector, sound: FolderFiles) -> None:
    verdict = inspector.look("tenant", REQUEST, sound)
    expected = estimate(REQUEST, inspect_checkpoint(sound))
    assert verdict.error is None
    assert verdict.estimates == expected


def test_a_tenant_has_one_look_at_a_time_and_others_are_not_kept(inspector: Inspector, sound: FolderFiles) -> None:
    first, second, third = Slow(sound), Slow(sound), Slow(sound)
    with ThreadPoolExecutor(3) as pool:
        looks = [pool.submit(inspector.look, "one", REQUEST, first)]
        assert first.begun.wait(30)
        looks.append(pool.submit(inspector.look, "one", REQUEST, second))
        looks.append(pool.submit(inspector.look, "other", REQUEST, third))
        assert third.begun.wait(30), "another tenant's look goes on"
        assert not second.begun.wait(0.3), "the tenant's second waits for its first"
        first.go.set()
        assert second.begun.wait(30)
        second.go.set()
        third.go.set()
        assert all(look.result(30).error is None for look in looks)


def test_looks_that_wait_are_counted(inspector: Inspector, sound: FolderFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 0)
    first = Slow(sound)
    with ThreadPoolExecutor(1) as pool:
        look = pool.submit(inspector.look, "one", REQUEST, first)
        assert first.begun.wait(30)
        with pytest.raises(TooManyRequests):
            inspector.look("one", REQUEST, sound)
        first.go.set()
        assert look.result(30).error is None
    assert inspector.look("one", REQUEST, sound).error is None


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (Limits(seconds=0.0, memory_bytes=1 << 30, answer_bytes=1 << 20), "seconds"),
        (Limits(seconds=30.0, memory_bytes=1 << 20, answer_bytes=1 << 20), "memory"),
        (Limits(seconds=30.0, memory_bytes=1 << 30, answer_bytes=40), "40 bytes"),
    ],
    ids=["time", "memory", "output"],
)
def test_a_look_beyond_a_limit_is_the_callers_error(
    limits: Limits, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:-1] + ', "more": "' + "x" * (3 << 20) + '"}')
    limited = Inspector(limits)
    verdict = limited.look("tenant", REQUEST, FolderFiles(folder))
    assert verdict.error is not None
    assert verdict.error.code == "over_limit"
    assert told in verdict.error.detail
    monkeypatch.setattr(limited, "_limits", module.LIMITS)
    assert limited.look("tenant", REQUEST, FolderFiles(write_checkpoint(tmp_path / "sound"))).error is None
    limited.close()


def test_a_file_that_shrinks_or_may_not_be_read_is_told(inspector: Inspector, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    files = Slow(FolderFiles(folder))
    with ThreadPoolExecutor(1) as pool:
        look = pool.submit(inspector.look, "tenant", REQUEST, files)
        assert files.begun.wait(30)
        os.truncate(folder / "config.json", 3)
        files.go.set()
        with pytest.raises(OSError, match="shorter than it was"):
            look.result(30)
    assert inspector.look("tenant", REQUEST, FolderFiles(write_checkpoint(tmp_path / "sound"))).error is None


def test_children_end_with_the_process_that_has_them(sound: FolderFiles) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from app.domain.inputs.inspection import FolderFiles; from app.inspection.inspector import Inspector\n"
        "from app.domain.request.job_request import JobRequest\n"
        "request = JobRequest.parse({'model': '/m', 'method': 'rtn', 'bits': 4})\n"
        "made = Inspector(); made.look('tenant', request, FolderFiles(Path(sys.argv[1])))\n"
        "print('pid', made._idle[0].handle.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(sound.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        assert alive(pid)
        process.kill()
    wait_for(lambda: not alive(pid), seconds=10, what="the child's end")
