"""Tensors in host memory through a GPU, some rows at a time: one part comes and another goes while the GPU works.

    coming   source[i + 1] -> arrival       main   arrival -> work -> departure       going   departure -> target[i - 1]

Three streams, of which each waits for the others by events, and two arrivals and two departures, so that what is on the
device does not grow with what is given to it ahead. Copies run beside the work where host memory is pinned.
"""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def in_transit(
    work: Callable[[Tensor], Tensor], source: Tensor, target: Tensor, *, rows: int, device: torch.device
) -> None:
    """target[i] = work(source[i]) for all rows, `rows` at a time; both in host memory, and perhaps the same tensor.

    Waits for the device at the end. `work` runs on the current stream.
    """
    parts = list(zip(torch.split(source, rows), torch.split(target, rows), strict=True))
    main = torch.cuda.current_stream(device)
    coming, going = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
    arrivals, departures = ([torch.empty_like(rows[side], device=device) for rows in parts[:2]] for side in range(2))
    for stream, buffers in ((coming, arrivals), (going, departures)):
        stream.wait_stream(main)  # whose memory the buffers were
        for buffer in buffers:
            buffer.record_stream(stream)  # should `work` fail, no copy in flight hits memory of somebody else
    arrived, used, sent = (list[torch.cuda.Event]() for _ in range(3))

    def fetch(index: int) -> None:
        if index >= 2:
            coming.wait_event(used[index - 2])
        with torch.cuda.stream(coming):
            _rows(arrivals, index, parts[index][0]).copy_(parts[index][0], non_blocking=True)
        arrived.append(coming.record_event())

    fetch(0)
    for index, (before, after) in enumerate(parts):
        if index + 1 < len(parts):
            fetch(index + 1)
        main.wait_event(arrived[index])
        computed = work(_rows(arrivals, index, before))
        used.append(main.record_event())
        if index >= 2:
            main.wait_event(sent[index - 2])
        leaving = _rows(departures, index, after)
        leaving.copy_(computed)
        going.wait_event(main.record_event())
        with torch.cuda.stream(going):
            after.copy_(leaving, non_blocking=True)
        sent.append(going.record_event())
    going.synchronize()


def _rows(buffers: list[Tensor], index: int, like: Tensor) -> Tensor:
    """The buffer whose turn it is, as long as a part."""
    return buffers[index % 2][: len(like)]
