"""A limited child with real processes: what it cannot do, and that each of its ends is a result."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.limited.limits import Ended, Limits, Outcome, last_lines
from app.limited.process import Handle, LimitedProcess, group_memory
from tests.supervise.bench import alive, wait_for

CHILD = """
import json, os, socket, subprocess, sys, time
for line in sys.stdin:
    told = dict(globals())
    try:
        exec(json.loads(line), told)
        answer = told.get("answer")
    except Exception as error:
        answer = type(error).__name__
    print(json.dumps(answer), flush=True)
"""
LIMITS = Limits(seconds=20, memory_bytes=400 << 20, answer_bytes=1000)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[LimitedProcess]:
    with LimitedProcess.start([sys.executable, "-c", CHILD], folder=tmp_path / "child", file_bytes=1 << 20) as made:
        yield made


def ask(child: LimitedProcess, code: str, limits: Limits = LIMITS) -> Outcome:
    return child.ask(json.dumps(code).encode(), limits)


def answer(child: LimitedProcess, code: str) -> object:
    outcome = ask(child, code)
    assert outcome.ended is Ended.ANSWERED, outcome
    return json.loads(outcome.answer)


def test_orders_come_one_after_another(child: LimitedProcess) -> None:
    assert [answer(child, f"answer = {n}") for n in (1, 2)] == [1, 2]


def test_nothing_outside_can_be_reached_but_its_own_loopback_can(child: LimitedProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            pass
        reached = answer(child, f"socket.create_connection(('127.0.0.1', {port}), 5); answer = 'reached'")
    assert reached in ("ConnectionRefusedError", "PermissionError")
    assert answer(child, "socket.create_connection(('192.0.2.1', 80), 5)") in ("OSError", "PermissionError")


def test_where_there_are_no_namespaces_sockets_are_refused(child: LimitedProcess) -> None:
    filtered = "from app.limited import launch; launch.refuse_internet_sockets(); "
    assert answer(child, filtered + "socket.socket(socket.AF_INET)") == "PermissionError"
    assert answer(child, "socket.socket(socket.AF_INET6)") == "PermissionError"
    assert answer(child, "socket.socketpair(); answer = 'a pipe'") == "a pipe"
    assert answer(child, "subprocess.run(['true'], check=True); answer = 'a program'") == "a program"


def test_it_has_no_secret_and_its_caches_are_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BITWRIGHT_HUB_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "s3cret")
    command = [sys.executable, "-c", CHILD]
    with LimitedProcess.start(command, folder=tmp_path / "child", file_bytes=1 << 20) as child:
        variables = answer(
            child, "answer = {k: v for k, v in os.environ.items() if k in ('HOME', 'HF_HOME', 'TMPDIR')}"
        )
        assert answer(child, "answer = [k for k, v in os.environ.items() if 's3cret' in v]") == []
        assert answer(child, "answer = os.environ['HF_HUB_OFFLINE'] + os.environ['DO_NOT_TRACK']") == "11"
    assert isinstance(variables, dict)
    assert len(variables) == 3
    assert all(Path(place).is_relative_to(tmp_path / "child") for place in variables.values())


@pytest.mark.parametrize(
    ("code", "limits", "ended", "words"),
    [
        ("os.kill(os.getpid(), 11)", LIMITS, Ended.DIED, "SIGSEGV"),
        ("os._exit(3)", LIMITS, Ended.DIED, "exit code 3"),
        ("time.sleep(60)", Limits(0.3, 1 << 30), Ended.TIMED_OUT, "0.3 seconds"),
        ("held = bytearray(600 << 20); time.sleep(60)", LIMITS, Ended.TOO_MUCH_MEMORY, "may take 400"),
        ("answer = 'x' * 2000", LIMITS, Ended.TOO_MUCH_OUTPUT, "1000 bytes"),
    ],
)
def test_every_end_is_a_result(child: LimitedProcess, code: str, limits: Limits, ended: Ended, words: str) -> None:
    outcome = ask(child, code, limits)
    assert outcome.ended is ended
    assert words in outcome.words
    assert not child.usable
    assert ask(child, "answer = 1").ended is Ended.DIED


def test_a_file_does_not_grow_beyond_its_limit(child: LimitedProcess) -> None:
    assert answer(child, "open('file', 'wb').write(bytes(2 << 20))") == "OSError"


def test_it_is_ended_with_everything_that_it_started(child: LimitedProcess) -> None:
    started = answer(child, "answer = subprocess.Popen(['sleep', '600']).pid")
    assert isinstance(started, int)
    assert ask(child, "time.sleep(60)", Limits(0.2, 1 << 30)).ended is Ended.TIMED_OUT
    wait_for(lambda: not alive(started), 10)


def test_memory_counts_all_that_it_started(child: LimitedProcess) -> None:
    before = group_memory(child.handle.pid)
    code = "held = subprocess.Popen([sys.executable, '-c', 'b = bytearray(100 << 20); input()'], stdin=-1)"
    assert answer(child, code) is None
    wait_for(lambda: group_memory(child.handle.pid) > before + (100 << 20), 20)


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.limited.process import LimitedProcess\n"
        f"child = LimitedProcess.start(['sleep', '600'], folder=Path({str(tmp_path / 'child')!r}), file_bytes=1)\n"
        "print(child.handle.pid, flush=True); input()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    wait_for(lambda: (Path(f"/proc/{pid}/comm").read_text().strip()) == "sleep", 20)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert owner.stdin is not None
    owner.stdin.close()
    wait_for(lambda: not alive(pid), 10)


def test_a_process_that_has_its_pipes_may_ask_it(child: LimitedProcess) -> None:
    borrowed = LimitedProcess(Handle(child.handle.orders, child.handle.answers, child.handle.pid))
    assert answer(borrowed, "answer = 5") == 5
    started = time.monotonic()
    assert ask(borrowed, "time.sleep(60)", Limits(0.2, 1 << 30)).ended is Ended.TIMED_OUT
    assert time.monotonic() - started < 10
    wait_for(lambda: not child.usable, 10)


def test_the_end_of_a_log_is_whole_lines_as_far_as_they_fit() -> None:
    assert last_lines("one\ntwo\n", 100) == "one\ntwo"
    assert last_lines("first line\nsecond\nthird\n", 14) == "second\nthird"
    assert last_lines("é" * 100, 11) == "é" * 5
