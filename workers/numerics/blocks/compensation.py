"""GPTQ's columns in turn and the sweeps after them, of weights in a block type; on a GPU as CUDA graphs.

What a small weight takes are some hundred launches, most of which cost more to ask for than to run. Weights of one
shape and type are asked for once: of those that a process sees on a GPU the first goes as it is written, the second is
captured as well, and every further one replays that on tensors that stay where they are. Kernels and their order are
the same, and so are the results, to the bit; a graph that says otherwise of the second is not used.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.blocks.descent import descend
from workers.numerics.blocks.elimination import columns_together, eliminate
from workers.numerics.blocks.stored_parts import copy_of, same_bytes
from workers.numerics.quantized import BlockWeight

MOST_WEIGHTS, MOST_COLUMNS = 1 << 22, 2048
"""Of a weight whose launches are worth a graph: what a graph holds is some ten times as large, and stays."""


@torch.no_grad()
def compensate(
    weight: Tensor,
    scheme: Scheme,
    factor: Tensor | None,
    moments: Tensor,
    order: Tensor | None = None,
    damped: Tensor | None = None,
    sweeps: int = 0,
) -> BlockWeight:
    """`eliminate` with the first five, and from there `descend` by H = `damped`, where there is one."""

    def made(weight: Tensor, factor: Tensor | None, moments: Tensor, damped: Tensor | None) -> BlockWeight:
        found = eliminate(weight, scheme, factor, moments, order)
        return found if damped is None else descend(weight, found, damped, sweeps)

    small = weight.numel() <= MOST_WEIGHTS and weight.shape[1] <= MOST_COLUMNS
    if factor is None or order is not None or not (weight.is_cuda and small) or columns_together(scheme) > 1:
        return made(weight, factor, moments, damped)
    given = (weight, factor, moments, *(() if damped is None else (damped,)))
    kind = (scheme, sweeps, weight.device, *((tensor.shape, tensor.dtype) for tensor in given))
    return _recorder(kind).result(lambda *of: made(*of, *([None] * (4 - len(of)))), given)


class _Recorder:
    """Calls of one kind: the first as it is written, the second captured, every further one replayed.

    unused   why there is no graph; None: there is one, or none was tried
    """

    def __init__(self) -> None:
        self.unused: str | None = None
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: tuple[Tensor, ...] = ()
        self._made: BlockWeight | None = None

    def result(self, function: Callable[..., BlockWeight], given: tuple[Tensor, ...]) -> BlockWeight:
        """The weight that the function makes of some tensors."""
        self._seen += 1
        found = self._replayed(given)
        if found is not None:
            return found
        made = function(*given)
        if self._seen == 2:
            self._capture(function, given)
            found = self._replayed(given)
            if found is not None and not same_bytes(found, made):
                self.unused, self._made = "it says otherwise", None  # the graph stays, and its pool with it
        return made

    def _replayed(self, given: tuple[Tensor, ...]) -> BlockWeight | None:
        """The weight that the graph makes of some tensors; None: there is no graph."""
        if self._graph is None or self._made is None:
            return None
        for place, tensor in zip(self._places, given, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return copy_of(self._made)

    def _capture(self, function: Callable[..., BlockWeight], given: tuple[Tensor, ...]) -> None:
        """Captures the function on tensors like these; nothing, where something cannot be captured."""
        places = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in given)
        graph, before, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                # Other threads read and write meanwhile; CUDA shall watch what this one does.
                graph.capture_begin(pool=_pool(given[0].device), capture_error_mode="thread_local")
                try:
                    made = function(*places)
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # memory has run out, too
            torch.cuda.set_stream(before)
            self.unused = str(error)
            _pool.cache_clear()  # one that no graph holds any more is not begun with again
            return
        before.wait_stream(stream)
        self._graph, self._places, self._made = graph, places, made


@cache
def _recorder(_kind: tuple[object, ...]) -> _Recorder:
    return _Recorder()


@cache
def _pool(_device: torch.device) -> Any:
    """Memory that all graphs of a device share: none of them runs while another does."""
    return torch.cuda.graph_pool_handle()
