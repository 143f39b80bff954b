"""A child is heard, bounded and never outlives its supervisor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.supervise.bench import alive, wait_for
from workers.child.lifeline import ATTEMPT, EXIT_ABANDONED, JOB_ID, REPORT_FD, SILENCE_SECONDS, SUPERVISOR_PID
from workers.supervise.child_process import ChildProcess, LineSplitter, cause, child_environment

CHILD = "tests.supervise.faithful_child"
NAMES = {JOB_ID: "job_x", ATTEMPT: "1"}


@given(st.lists(st.binary(max_size=12)), st.integers(1, 40))
def test_lines_do_not_depend_on_how_the_stream_is_cut(pieces: list[bytes], size: int) -> None:
    stream = b"".join(pieces)
    whole = LineSplitter().feed(stream)
    cut = LineSplitter()
    found = [line for i in range(0, len(stream), size) for line in cut.feed(stream[i : i + size])]
    assert found == whole == stream.split(b"\n")[:-1]


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line)), st.integers(1, 7))
def test_lines_beyond_the_limit_are_dropped_and_counted(lines: list[bytes], size: int) -> None:
    splitter = LineSplitter(limit=10)
    stream = b"".join(line + b"\n" for line in lines)
    found = [line for i in range(0, len(stream), size) for line in splitter.feed(stream[i : i + size])]
    assert found == [line for line in lines if len(line) <= 10]
    assert splitter.dropped == len(lines) - len(found)


def test_a_line_without_end_takes_no_memory() -> None:
    splitter = LineSplitter(limit=1000)
    for _ in range(10_000):
        splitter.feed(b"x" * 100)
    assert sum(map(len, splitter._parts)) <= 1000


def start(tmp_path: Path, *arguments: str, silence: float = 20, peers: list[list[str]] | None = None) -> ChildProcess:
    return ChildProcess(
        [CHILD, *arguments],
        environment=child_environment(NAMES),
        log_path=tmp_path / "log",
        silence_seconds=silence,
        peers=[[CHILD, *peer] for peer in peers or []],
    )


def first_line(child: ChildProcess) -> bytes:
    for _ in range(200):
        if lines := child.lines(0.2):
            return lines[0]
    raise TimeoutError("the child said nothing")


def test_leaving_the_block_ends_a_deaf_child_and_its_children(tmp_path: Path) -> None:
    with start(tmp_path, "deaf") as child:
        grandchild = int(first_line(child))
        assert alive(child.pid)
        assert alive(grandchild)
        asked = time.monotonic()
    assert time.monotonic() - asked < 3
    wait_for(lambda: not alive(child.pid) and not alive(grandchild), 2)


def test_what_a_dead_child_left_behind_ends_before_its_guard_hears_of_it(tmp_path: Path) -> None:
    with start(tmp_path, "deaf", silence=600) as child:
        grandchild = int(first_line(child))
        os.kill(child.pid, signal.SIGKILL)
        wait_for(child.ended, what="the end of the child")
        assert alive(grandchild)
        assert child.finish() == -signal.SIGKILL
        wait_for(lambda: not alive(grandchild), 5, what="the end of the grandchild, the control pipe still open")


def test_the_last_words_of_a_child_are_heard(tmp_path: Path) -> None:
    with start(tmp_path, "say", "200000") as child:
        heard = []
        while not child.ended():
            heard += child.lines(0.05)
        heard += child.remaining_lines()
        assert child.finish() == 0
    assert heard == [b"%d" % i for i in range(200_000)]


def test_a_child_runs_on_while_it_hears_its_supervisor(tmp_path: Path) -> None:
    with start(tmp_path, "wait", silence=2.5) as child:
        first_line(child)
        time.sleep(4)
        assert not child.ended()


@pytest.mark.parametrize("how", ["silence", "end of file"])
def test_a_child_without_a_supervisor_ends(tmp_path: Path, how: str) -> None:
    """A supervisor that is stopped writes nothing; one that died closes the pipe."""
    reading, writing = os.pipe()
    environment = child_environment(NAMES) | {
        REPORT_FD: str(writing),
        SUPERVISOR_PID: str(os.getpid()),
        SILENCE_SECONDS: "1.0" if how == "silence" else "600",
    }
    command = [sys.executable, "-m", CHILD, "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=(writing,)) as child:
        os.close(writing)
        assert os.read(reading, 10)
        assert child.stdin is not None
        if how == "end of file":
            child.stdin.close()
        assert child.wait(5) == -signal.SIGKILL
    os.close(reading)


def test_all_processes_of_a_child_end_with_the_block_and_are_deaf_to_nothing(tmp_path: Path) -> None:
    with start(tmp_path, "deaf", peers=[["deaf"], ["deaf"]]) as child:
        grandchildren: list[int] = []
        while len(grandchildren) < 3:
            grandchildren += map(int, child.lines(0.2))
        assert len(set(child.pids)) == 3
        assert not child.ended()
        asked = time.monotonic()
    assert time.monotonic() - asked < 3
    wait_for(lambda: not any(map(alive, child.pids + grandchildren)), 2)


@pytest.mark.parametrize("by", ["an exit code", "a signal"])
def test_the_end_of_a_peer_is_the_end_of_the_child(by: str, tmp_path: Path) -> None:
    with start(tmp_path, "deaf", peers=[["wait"], ["end", "3"] if by == "an exit code" else ["wait"]]) as child:
        first_line(child)
        if by == "a signal":
            os.kill(child.pids[2], signal.SIGKILL)
        wait_for(child.ended, 5, what="the end of the child")
        assert child.finish() == (3 if by == "an exit code" else -signal.SIGKILL)
        assert child.finish() == child.finish()
    wait_for(lambda: not any(map(alive, child.pids)), 2)


def test_a_peer_that_is_done_ends_nothing(tmp_path: Path) -> None:
    with start(tmp_path, "wait", peers=[["end", "0"]]) as child:
        wait_for(lambda: not alive(child.pids[1]))
        assert not child.ended()
        os.kill(child.pid, signal.SIGKILL)
        wait_for(child.ended)
        assert child.finish() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([None], None),
        ([0], 0),
        ([0, -9], 0),  # the result is there: what a peer dies of afterwards is no matter
        ([1, None], 1),
        ([None, 0, 7], 7),
        ([1, -9], -9),  # the first process misses the one that was killed
        ([-6, -9, 1], -9),
        ([None, 0, None], None),
    ],
)
def test_the_code_that_tells_why_a_child_ended(codes: list[int | None], expected: int | None) -> None:
    assert cause(codes) == expected


def test_a_killed_supervisor_takes_its_children_and_grandchildren_along(tmp_path: Path) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-m", CHILD, "supervise", str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        env=child_environment(NAMES),
    )
    assert supervisor.stdout is not None
    pids = list(map(int, supervisor.stdout.readline().split()))
    assert len(pids) == 4
    assert all(map(alive, pids))
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    supervisor.stdout.close()
    wait_for(lambda: not any(map(alive, pids)), 2, what="the end of all")


def test_a_stopped_child_without_a_supervisor_ends(tmp_path: Path) -> None:
    """The guard needs nothing from the child itself."""
    with start(tmp_path, "wait", silence=3) as child:
        first_line(child)
        os.kill(child.pid, signal.SIGSTOP)
        child._closing.set()  # the pulse stops
        wait_for(child.ended, 6, what="the end by the guard")


def test_a_child_whose_supervisor_died_before_it_started_ends(tmp_path: Path) -> None:
    environment = child_environment(NAMES) | {REPORT_FD: "1", SUPERVISOR_PID: "1", SILENCE_SECONDS: "600"}
    command = [sys.executable, "-m", CHILD, "wait"]
    ended = subprocess.run(command, check=False, env=environment, stdin=subprocess.DEVNULL, timeout=20)
    assert ended.returncode == EXIT_ABANDONED
