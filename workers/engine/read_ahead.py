"""The next block is read while the one in hand is worked on: one thread, at most one block ahead.

On a GPU the thread copies through pinned memory on a stream of its own, so that neither the main thread nor the device
waits for a disk. Memory: besides the block in hand one more (of finished blocks that are replayed, original and
dequantized weights), and two pinned buffers of `CHUNK_BYTES`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from workers.engine.blocks import StreamedModel
from workers.engine.resume import ResumeState
from workers.engine.side_stream import SideStream, hand_over, mark

T = TypeVar("T")
CHUNK_BYTES = 1 << 25


@dataclass(frozen=True)
class ReadBlock:
    """Weights of a block on the device by full parameter name; whoever uses them takes them out.

    original    all of them, as in the checkpoint
    quantized   dequantized weights of its quantized linears, if it is finished; else empty
    """

    original: dict[str, Tensor]
    quantized: dict[str, Tensor]

    def hand_over(self) -> None:
        """To the calling thread."""
        for weights in (self.original, self.quantized):
            for name in weights:
                hand_over(weights[name])


class BlockReader:
    """Reads a model's blocks in order, each once, a block ahead. Close what it gives (`contextlib.closing`)."""

    def __init__(self, model: StreamedModel, state: ResumeState) -> None:
        self._model = model
        self._state = state

    def blocks(self) -> Iterator[ReadBlock]:
        """Original weights of all blocks, and quantized ones of those that `state` held from the start.

        Raises:
            NumericalFailure: a weight is not finite.
        """
        upload = Upload(self._model.device) if self._model.device.type == "cuda" else None

        def read(index: int) -> ReadBlock:
            quantized = self._quantized(index) if index < self._state.resumed else {}
            return ReadBlock(self._model.read(self._model.layout.block(index), upload=upload), quantized)

        with closing(read_ahead(read, len(self._model.blocks), self._model.device)) as blocks:
            for block in blocks:
                block.hand_over()
                yield block

    def quantized_blocks(self) -> Iterator[dict[str, Tensor]]:
        """All weights of all blocks, which must be finished: those of quantized linears are the dequantized ones."""

        def read(index: int) -> ReadBlock:
            given = self._quantized(index)
            return ReadBlock({}, self._model.read(self._model.layout.block(index), given))

        with closing(read_ahead(read, len(self._model.blocks), self._model.device)) as blocks:
            for block in blocks:
                block.hand_over()
                yield block.quantized

    def _quantized(self, index: int) -> dict[str, Tensor]:
        weights = self._state.load(index)
        return {f"{name}.weight": weight.to(self._model.device).dequantize() for name, weight in weights.items()}


def read_ahead(read: Callable[[int], T], count: int, device: torch.device) -> Iterator[T]:
    """read(0), ..., read(count - 1); each runs in a thread from the moment on that the one before it is asked for.

    Nothing is kept of an item that was given. What `read` raises is raised where that item is asked for. Close the
    iterator (`contextlib.closing`) when not all items are taken.
    """
    side = SideStream(device)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:

        def start(index: int) -> Callable[[], T]:
            # Not before the device is done with the item before the last, whose memory this one takes.
            before = mark(device)

            def run() -> T:
                with side.running(after=before):
                    return read(index)

            return thread.submit(run).result

        waiting = [start(0)] if count else []
        for index in range(count):
            item = [waiting.pop()()]
            if index + 1 < count:
                waiting.append(start(index + 1))
            yield item.pop()


class Upload:
    """Copies tensors from (mapped) host memory to the device, on the calling thread's stream, through pinned memory.

    While one pinned buffer is copied to the device the other one is filled, which is when the disk is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_Pinned.of(CHUNK_BYTES) for _ in range(2)]

    def __call__(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """`source` on the device in `dtype`, once the stream is there."""
        target = torch.empty(source.shape, dtype=dtype, device=self._device)
        for place, part in zip(
            target.view(-1).split(CHUNK_BYTES // dtype.itemsize),
            source.reshape(-1).split(CHUNK_BYTES // dtype.itemsize),
            strict=True,
        ):
            self._buffers.reverse()
            self._buffers[0].send(part, place)
        return target


@dataclass(frozen=True)
class _Pinned:
    """A pinned buffer of bytes, and the event after which it may be filled again."""

    data: Tensor
    free: torch.cuda.Event

    @classmethod
    def of(cls, size: int) -> "_Pinned":
        return cls(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())

    def send(self, part: Tensor, place: Tensor) -> None:
        self.free.synchronize()  # type: ignore[no-untyped-call]
        staged = self.data[: place.nbytes].view(place.dtype)
        staged.copy_(part)
        place.copy_(staged, non_blocking=True)
        self.free.record()
