"""Numba's compiler as loops use it: without the interpreter's lock, with IEEE's divisions, and with its cache.

What is compiled is kept only where whoever started the process says so (`NUMBA_CACHE_DIR`): the cache does not see
that a loop calls another file's, so that its folder has to belong to one version of the code
(`workers.supervise.kernels`).
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import config, njit

ANY_ORDER = {"reassoc", "nsz"}
"""Freedom of a loop that adds up: the order of the sum."""


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for the types of its arguments when it is first called with them."""
    return _kept(njit(nogil=True, error_model="numpy")(function))


def adding_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a loop with sums, whose order the processor's vector units decide."""
    return _kept(njit(nogil=True, error_model="numpy", fastmath=ANY_ORDER)(function))


def are_kept() -> bool:
    """True where this process was given compiled loops."""
    return bool(config.CACHE_DIR) and Path(config.CACHE_DIR).is_dir()


def _kept(dispatcher: Any) -> Callable[..., Any]:
    if config.CACHE_DIR:
        with suppress(RuntimeError):  # the folder cannot be written
            dispatcher.enable_caching()
    compiled: Callable[..., Any] = dispatcher
    return compiled
