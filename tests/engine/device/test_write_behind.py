"""Writing behind: in order, in another thread, and no error is lost."""

import threading
import time

import pytest
import torch

from workers.engine.device.write_behind import WriteBehind

CPU = torch.device("cpu")


def test_what_is_given_is_done_in_order_beside_the_main_thread() -> None:
    done: list[object] = []
    hold = threading.Event()

    def write() -> str:
        done.append(threading.current_thread())
        return "result"

    with WriteBehind(CPU) as writer:
        writer.give(hold.wait)
        result = writer.give(write)
        writer.give(lambda: done.append(result.result()))
        assert done == []
        hold.set()
        writer.wait()
        assert done[1:] == ["result"]
        assert done[0] is not threading.main_thread()


def test_leaving_waits_for_what_was_given() -> None:
    done: list[int] = []

    def write() -> None:
        time.sleep(0.05)
        done.append(1)

    with WriteBehind(CPU) as writer:
        writer.give(write)
    assert done == [1]


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_an_error_is_raised_as_it_was_by_every_wait_and_at_the_end() -> None:
    writer = WriteBehind(CPU)
    failed = writer.give(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            writer.wait()
        assert caught.value is failed.exception()
    with pytest.raises(OSError, match="No space left"), writer:
        pass


def test_an_error_of_the_main_thread_comes_first_and_what_was_given_is_still_done() -> None:
    done: list[int] = []
    writer = WriteBehind(CPU)
    writer.give(lambda: time.sleep(0.02))
    writer.give(lambda: done.append(1))
    writer.give(fail)
    with pytest.raises(ValueError, match="main"), writer:
        raise ValueError("main")
    assert done == [1]
