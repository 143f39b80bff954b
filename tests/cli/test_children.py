"""Children of `serve`, as real processes: kept alive while it lives, gone when it is gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli.broker import LONGEST_SOCKET_PATH, SOCKET_NAME, answers, broker_program, broker_url, runtime_folder
from app.cli.children import Children, Program
from bitwright.errors import Unavailable
from tests.cli.processes import alive, eventually

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


def test_a_killed_child_is_started_again() -> None:
    children = Children([Program("sleeper", SLEEP)], environment=dict(os.environ))
    children.start()
    try:
        first = children.pids()["sleeper"]
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: children.pids().get("sleeper", first) != first)
    finally:
        last = children.pids()["sleeper"]
        children.stop()
    assert not alive(last)


def test_stop_ends_a_child_that_ignores_sigterm_and_what_it_started(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(grandchild.pid)); time.sleep(600)"
    )
    program = Program("stubborn", (sys.executable, "-c", code), stop_seconds=0.3, ready=(tmp_path / "pid").exists)
    children = Children([program], environment=dict(os.environ))
    children.start()
    stubborn, grandchild = children.pids()["stubborn"], int((tmp_path / "pid").read_text())
    assert alive(stubborn)
    assert alive(grandchild)
    children.stop()
    assert not alive(stubborn)
    assert eventually(lambda: not alive(grandchild))


def test_a_child_that_ends_before_it_is_ready_is_an_error_and_ends_the_others() -> None:
    broken = Program("broken", (sys.executable, "-c", "raise SystemExit(7)"), ready=lambda: False)
    children = Children([Program("sleeper", SLEEP), broken], environment=dict(os.environ))
    with pytest.raises(Unavailable, match="broken ended with exit code 7"):
        children.start()
    assert children.pids() == {}


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, pathlib; from app.cli.children import Children, Program;"
        "children = Children([Program('sleeper', (sys.executable, '-c', 'import time; time.sleep(600)'))], os.environ);"
        "children.start();"
        f"pathlib.Path({str(tmp_path / 'new')!r}).write_text(str(children.pids()['sleeper']));"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r}); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        assert eventually((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
        parent.kill()
    assert eventually(lambda: not alive(pid), seconds=5)


def test_the_broker_answers_on_its_socket_and_comes_back_after_a_kill() -> None:
    with runtime_folder() as folder:
        path = folder / SOCKET_NAME
        assert folder.stat().st_mode & 0o777 == 0o700
        assert broker_url(folder) == f"redis+socket://{path}"
        children = Children([broker_program(folder)], environment=dict(os.environ))
        children.start()
        try:
            assert answers(path)
            os.kill(children.pids()["valkey"], signal.SIGKILL)
            assert eventually(lambda: not answers(path))
            assert eventually(lambda: answers(path))
        finally:
            children.stop()
        assert not answers(path)
    assert not folder.exists()


def test_a_socket_path_that_is_too_long_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * LONGEST_SOCKET_PATH)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with runtime_folder() as folder:
        assert len(os.fsencode(folder / SOCKET_NAME)) <= LONGEST_SOCKET_PATH
    assert list(long.iterdir()) == []
