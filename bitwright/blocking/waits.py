"""Waiting in a blocking program; the names are those of `bitwright.asynchronous.waits`."""

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

PROGRESS_BY_DEFAULT: bool | None = None
"""Bars where somebody looks on."""

ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")

sleep = time.sleep


def in_thread(
    function: Callable[ParametersT, ResultT], /, *args: ParametersT.args, **kwargs: ParametersT.kwargs
) -> ResultT:
    """Work on files: in this very thread, for nothing else waits in it."""
    return function(*args, **kwargs)
