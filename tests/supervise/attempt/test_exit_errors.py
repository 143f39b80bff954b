"""Exit codes, signals and exceptions in the words of the error tree."""

import errno
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from bitwright.errors import BitwrightError, CorruptCheckpoint
from bitwright.events import ErrorData
from workers.child.exceptions import as_bitwright_error
from workers.machine import oom_kills
from workers.supervise.attempt.exit_errors import error_of_exit

SAID = ErrorData(code="corrupt_checkpoint", detail="bad", field="model", value="x", hint="mend it")


@pytest.mark.parametrize(
    ("code", "said", "oom", "expected"),
    [
        (1, SAID, False, "corrupt_checkpoint"),
        (1, None, False, "internal_error"),
        (0, None, False, "internal_error"),
        (76, None, False, "internal_error"),
        (-signal.SIGKILL, None, False, "attempt_killed"),
        (-signal.SIGKILL, None, True, "out_of_memory"),
        (-signal.SIGKILL, SAID, False, "attempt_killed"),
        (-signal.SIGSEGV, None, True, "attempt_killed"),
        (-60, None, False, "attempt_killed"),  # a real-time signal has no name
    ],
)
def test_error_of_exit(code: int, said: ErrorData | None, oom: bool, expected: str) -> None:
    assert error_of_exit(code, said, oom_killed=oom).code == expected


def test_an_error_arrives_as_it_was_sent() -> None:
    error = error_of_exit(1, SAID, oom_killed=False)
    assert isinstance(error, CorruptCheckpoint)
    assert ErrorData.of(error) == SAID


def test_oom_kills_are_read_from_the_own_cgroup(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert oom_kills(tmp_path, membership) == 0
    (tmp_path / "memory.events").write_text("oom 9\noom_kill 9\n")
    assert oom_kills(tmp_path, membership) == 9
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(tmp_path, membership) == 2
    membership.write_text("12:memory:/x\n")  # cgroup 1
    assert oom_kills(tmp_path, membership) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptCheckpoint("x"), "corrupt_checkpoint"),
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOMEM, "x"), "out_of_memory"),
        (OSError(errno.ENOSPC, "x"), "disk_full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out_of_gpu_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "cuda_error"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1"), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "cuda_error"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), "out_of_gpu_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out_of_gpu_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `x`"), "cuda_error"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk_full"),
        (KeyError("x"), "internal_error"),
        (KeyboardInterrupt(), "internal_error"),
    ],
)
def test_as_bitwright_error(error: BaseException, code: str) -> None:
    known = as_bitwright_error(error)
    assert isinstance(known, BitwrightError)
    assert known.code == code
    assert "\n" not in known.detail


def test_an_exit_is_told_with_what_ended_and_how() -> None:
    killed = error_of_exit(-9, None, oom_killed=False, what="fetch")
    assert (killed.detail, killed.value) == ("the fetch's process was ended by SIGKILL", "SIGKILL")
    assert error_of_exit(-60, None, oom_killed=False).value == "signal 60"
    starved = error_of_exit(-9, None, oom_killed=True)
    assert "a machine with more memory" in str(starved.hint)
    assert error_of_exit(3, None, oom_killed=False).detail.startswith(
        "the attempt ended with exit code 3 and no result"
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "internal_error"), (28, "disk_full")],
)
def test_a_childs_disk_is_full_by_its_size_or_a_quota(number: int, code: str) -> None:
    assert as_bitwright_error(OSError(number, "x")).code == code


def test_a_real_allocation_that_is_too_large_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert as_bitwright_error(caught.value).code == "out_of_memory"
