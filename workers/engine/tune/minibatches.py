"""The sequences that tuning steps read: on the device, at addresses that never change, wherever activations live.

Where inputs and targets are on the device, steps pick their rows out of them. Where they are in host memory, a step's
rows come through two buffers on the device: a side stream fills `ahead` with the next step's rows while the present
step runs, and before the next step they are copied to the rows that steps read. So a copy from the host hides behind
a step, and a step can be captured. The held-out rows, which are read several times, are brought once per run.
"""

from contextlib import nullcontext

import torch
from torch import Tensor


class Minibatches:
    """Of one run of steps, and after it of others over tensors of the same shapes.

    inputs, targets   what steps read, (rows, length, width)
    held_out          rows of these that validate and never train

    A run is `start`, then for each step `bring` and `rows`.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, device: torch.device, *, batches: Tensor, held_out: Tensor
    ) -> None:
        """Inputs, targets (sequences, length, width); indices of each step (steps, batch) and held out (count,)."""
        self._staging: _Staging | None = None
        if is_far(inputs, device):
            self._staging = _Staging((inputs, targets), device, batch=batches.shape[1], fixed=len(held_out))
            self.inputs, self.targets = self._staging.rows
            rows = torch.arange(len(self.inputs), device=device)
            self._batch, self.held_out = torch.split(rows, [batches.shape[1], len(held_out)])
        else:
            self.inputs, self.targets = inputs, targets
            self._batches, self.held_out = batches.to(device), held_out.to(device)
        self.adopt(inputs, targets, batches=batches, held_out=held_out)

    def adopt(self, inputs: Tensor, targets: Tensor, *, batches: Tensor, held_out: Tensor) -> None:
        """Takes over another run's sequences: of the same tensors, or of any of their shapes.

        Those of other tensors on the device are copied over the first run's, which must be this object's alone.
        """
        if self._staging is None:
            for own, other in ((self.inputs, inputs), (self.targets, targets)):
                if own.data_ptr() != other.data_ptr():
                    own.copy_(other)
            self._batches.copy_(batches)
            self.held_out.copy_(held_out)
        else:
            self._staging.adopt((inputs, targets), batches.tolist(), held_out.tolist())

    @property
    def bytes(self) -> int:
        """Of inputs and targets on the device."""
        return self.inputs.nbytes + self.targets.nbytes

    def start(self) -> None:
        """To the first step; afterwards `inputs` and `targets` hold real rows."""
        if self._staging is not None:
            self._staging.start()

    def bring(self) -> None:
        """Has the next step's rows in their place when the device gets to that step; waits for nothing."""
        if self._staging is not None:
            self._staging.bring()

    def rows(self, done: Tensor) -> Tensor:
        """Rows of the present step, (batch,), on the device, as `done` (1,), int64, counts steps there."""
        return self._batch if self._staging is not None else self._batches.index_select(0, done)[0]


def is_far(tensor: Tensor, device: torch.device) -> bool:
    """True if a tensor must be copied to be used on the device."""
    return tensor.device.type != device.type


def address(tensor: Tensor, device: torch.device) -> tuple[object, ...]:
    """Properties that a captured step depends on which reads this tensor through `Minibatches`."""
    return (None if is_far(tensor, device) else tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)


class _Staging:
    """Rows of tensors in (pinned) host memory: `rows` holds those of the present step, then the fixed ones."""

    def __init__(self, sources: tuple[Tensor, ...], device: torch.device, *, batch: int, fixed: int) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._batch = batch
        self.rows, self._ahead = (
            tuple(torch.empty(count, *s.shape[1:], dtype=s.dtype, device=device) for s in sources)
            for count in (batch + fixed, batch)
        )
        if self._stream is not None:
            for tensor in self._ahead:
                tensor.record_stream(self._stream)

    def adopt(self, sources: tuple[Tensor, ...], batches: list[list[int]], fixed: list[int]) -> None:
        self._sources, self._batches, self._fixed = sources, batches, fixed

    def start(self) -> None:
        for rows, source in zip(self.rows, self._sources, strict=True):
            _fill(rows[self._batch :], source, self._fixed)
        self._left = iter(self._batches)
        self._fetch()
        self._take()  # for a capture; the first step takes these rows once more

    def bring(self) -> None:
        self._take()
        self._fetch()

    def _fetch(self) -> None:
        """Begins to copy the rows of the step after the next `_take`, if there is one."""
        indices = next(self._left, None)
        if indices is None:
            return
        if self._stream is not None:
            # Not before the host rows are written, nor before the rows of the last fetch are taken.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for ahead, source in zip(self._ahead, self._sources, strict=True):
                _fill(ahead, source, indices)

    def _take(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for rows, ahead in zip(self.rows, self._ahead, strict=True):
            rows[: self._batch].copy_(ahead)


def _fill(rows: Tensor, source: Tensor, indices: list[int]) -> None:
    for row, index in zip(rows, indices, strict=True):
        row.copy_(source[index], non_blocking=True)
