"""Work of a thread beside the main one: a stream of its own on a GPU, nothing but the thread itself on a CPU.

A thread waits for what the main thread has given the device before (`Mark`), never the other way round: the main
thread takes up results when they are whole. A capture in the main thread is not disturbed
(`workers.engine.device.cuda_graphs` asks CUDA to watch its own thread only).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Mark = torch.cuda.Event | None
"""A point in what a stream has been given to do; None on a CPU, where everything given is done."""


class SideStream:
    """One stream, used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def running(self, after: Mark = None) -> Iterator[None]:
        """Direct the calling thread's work to this stream, once `after` is reached; it is complete at the end."""
        if self._stream is None:
            yield
            return
        if after is not None:
            after.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def mark(device: torch.device) -> Mark:
    """All that the calling thread has given the device up to now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def hand_over(tensor: Tensor) -> Tensor:
    """A tensor that a side stream made; its memory is not used anew while the calling thread's stream needs it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
