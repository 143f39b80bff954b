"""The next block is read while the one in hand is worked on: one thread, at most one block ahead.

On a GPU the thread copies through pinned memory on a stream of its own, so that neither the main thread nor the device
waits for a disk. Memory: besides the block in hand one more (of finished blocks that are replayed, original and
dequantized weights), and two pinned buffers of `CHUNK_BYTES`.
"""

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from workers.engine.device.side_stream import Mark, SideStream, mark

T = TypeVar("T")
CHUNK_BYTES = 1 << 25


def read_ahead(read: Callable[[int], T], count: int, device: torch.device) -> Generator[T, None, None]:
    """read(0), ..., read(count - 1); each runs in a thread from the moment on that the one before it is asked for.

    Nothing is kept of an item that was given. What `read` raises is raised where that item is asked for; but if the
    device has no room for two, the item is read when it is asked for. Close the iterator (`contextlib.closing`) when
    not all items are taken.
    """
    side = SideStream(device)

    def start(index: int) -> Future[T]:
        # Not before the device is done with the item before the last, whose memory this one takes.
        before = mark(device)

        def run() -> T:
            with side.running(after=before):
                return read(index)

        return thread.submit(run)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        labels = start(0) if count else None
        for index in range(count):
            assert labels is not None  # noqa: S101 - for the type checker
            if isinstance(labels.exception(), torch.OutOfMemoryError):
                labels = None  # holds what was read so far
                labels = start(index)
            item = [labels.result()]
            labels = start(index + 1) if index + 1 < count else None
            yield item.pop()


class Upload:
    """Copies tensors from (mapped) host memory to the device, on the calling thread's stream, through pinned memory.

    While one pinned buffer is copied to the device the other one is filled, which is when the disk is read.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        self._buffers = [_Pinned(chunk_bytes, device) for _ in range(2)]
        self._chunk_bytes = chunk_bytes

    def __call__(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """`source` on the device in `dtype`, once the stream is there."""
        target = torch.empty(source.shape, dtype=dtype, device=self._device)
        size = self._chunk_bytes // dtype.itemsize
        for chunk, place in zip(torch.split(source.reshape(-1), size), torch.split(target.view(-1), size), strict=True):
            self._buffers.reverse()
            self._buffers[0].send(chunk, place)
        return target


class _Pinned:
    """A buffer that may be filled again when its last copy to the device is done."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._data = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sent: Mark = None

    def send(self, chunk: Tensor, place: Tensor) -> None:
        if self._sent is not None:
            self._sent.synchronize()
        staged = self._data[: place.nbytes].view(place.dtype)
        staged.copy_(chunk)
        place.copy_(staged, non_blocking=True)
        self._sent = mark(self._device)
