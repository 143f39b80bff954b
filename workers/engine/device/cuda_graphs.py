"""A step as CUDA graphs: captured once, replayed for every further step on the same tensors.

A graph replays kernels on addresses, so whatever changes from step to step must lie in tensors that stay where they
are. With several ranks the exchange between them is in no graph: a step is then two graphs with the exchange between.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workers.engine.device.process_group import ProcessGroup

WARM_UPS = 2
"""Eager steps before a capture, in which libraries allocate what they keep."""


def captured(
    before: Callable[[], None],
    exchange: Callable[[], None],
    after: Callable[[], None],
    still: tuple[Tensor, ...],
    processes: ProcessGroup,
    pool: Any = None,
) -> Callable[[], None]:
    """The three one after another: one graph without the exchange for a world of one, else it runs between two.

    still   tensors that are 0 while the step is tried: rates, so that nothing moves, and counts
    pool    memory that the graphs share with others, of which one alone runs at a time; nothing in it outlives a replay

    Raises:
        RuntimeError: something in a step cannot be captured.
        torch.OutOfMemoryError: a step does not fit.
    """
    if processes.alone:

        def both() -> None:
            before()
            after()

        return capture(both, still, pool)
    first, second = capture(before, still, pool), capture(after, still, pool)

    def replay() -> None:
        first()
        exchange()
        second()

    return replay


def capture(function: Callable[[], None], still: Iterable[Tensor], pool: Any = None) -> Callable[[], None]:
    """`function` as a replay of a CUDA graph; it runs a few times on the way, each time with `still` filled with 0.

    With rates of 0 nothing moves, and a count of 0 steps keeps within the batches, of which there may be only one.
    """

    def try_still() -> None:
        _clear(still)
        function()

    warm_up(try_still)
    _clear(still)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool):
        function()
    return graph.replay


def warm_up(function: Callable[[], None]) -> None:
    """Runs what is to be captured a few times, on a stream of its own as a capture does."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Capture of a graph, in the memory pool of other graphs or (None) in one of its own.

    Raises:
        RuntimeError: something cannot be captured, or memory has run out; the current stream is that of before.
    """
    before = torch.cuda.current_stream()
    try:
        # Other threads read and write meanwhile; CUDA shall watch what this one does.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        torch.cuda.set_stream(before)  # an end by an error leaves the capture's


def _clear(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()
