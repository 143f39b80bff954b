"""A GPU's memory for the stacks of its threads: a process that waits for a job gives it back and takes it again.

A context sets a stack aside for every thread that the GPU can run at once, 1 KiB each by default: 260 MB on an H200,
half of what a context takes. To change the size takes half a millisecond there.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

STACK_SIZE = 0
"""CU_LIMIT_STACK_SIZE, of CUDA's driver."""
LEAST_BYTES = 16


class Driver(Protocol):
    """Calls of CUDA's driver; both answer 0 or an error's number, and mean the thread's current context."""

    def cuCtxGetLimit(self, value: Any, limit: int, /) -> int:  # noqa: N802
        """Write a limit to where `value` points."""
        ...

    def cuCtxSetLimit(self, limit: int, value: ctypes.c_size_t, /) -> int:  # noqa: N802
        """Set a limit."""
        ...


def loaded_driver() -> Driver | None:
    """The driver of this process's context; None where there is none of that name."""
    try:
        return ctypes.CDLL("libcuda.so.1" if sys.platform == "linux" else "nvcuda")
    except OSError:
        return None


def give_stacks_back(driver: Driver | None) -> Callable[[], None]:
    """Let stacks be as small as can be until what is returned is called, from the same thread.

    Where the driver does not let them, all stays as it is. The function raises RuntimeError where the usual stacks are
    not to be had again.
    """
    usual = ctypes.c_size_t()
    if driver is None or driver.cuCtxGetLimit(ctypes.byref(usual), STACK_SIZE):
        return _nothing
    if driver.cuCtxSetLimit(STACK_SIZE, ctypes.c_size_t(LEAST_BYTES)):
        return _nothing
    return partial(_take_again, driver, usual)


def _take_again(driver: Driver, usual: ctypes.c_size_t) -> None:
    code = driver.cuCtxSetLimit(STACK_SIZE, usual)
    if code:
        raise RuntimeError(f"the GPU does not give stacks of {usual.value} bytes a thread: error {code} of the driver")


def _nothing() -> None:
    """All is as it was."""
