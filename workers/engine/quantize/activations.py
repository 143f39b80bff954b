"""Activations of a text: the same sequences through the original blocks and through the quantized ones.

    X_fp, X_q   (sequences, length, width), the model's dtype, on the device or in (pinned) host memory

The target of block k is block_k(X_fp), and the quantized block sees X_q, so that each block also corrects the error of
the blocks before it. Before block 0 both are the embeddings, of X_q the quantized ones where they are quantized.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from workers.engine.device.process_group import ProcessGroup
from workers.engine.model.block_calls import BlockCall, run_block
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan
from workers.engine.quantize.cache_states import CacheWatch, with_cache
from workers.engine.quantize.serving import Served

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Elements that are held in fp32 at a time when squares are summed: on a CPU, what stays in its caches."""


class Activations:
    """Hidden states of a set of sequences, in the original and in the quantized model.

    original    X_fp; after `advance_original`, the original block's output
    inputs_fp   X_fp before the block; None unless a method needs it
    quantized   X_q; after `advance_quantized`, the quantized block's output
    reference   the same through blocks that are rounded to nearest; None unless the report has that row
    served      by block: what a server of the result rounds besides, in `quantized` and in `reference`
    """

    def __init__(
        self, model: StreamedModel, ids: Tensor, plan: Plan, *, keep_inputs: bool, reference: bool = False
    ) -> None:
        self._device = model.device
        self._ids = ids
        self._given: Mapping[str, Tensor] = {}
        self._pass_batch = plan.pass_batch
        self.calls = model.capture_calls(ids.shape[1])
        self.original, self.quantized = (_buffer(model, ids, plan) for _ in range(2))
        self.inputs_fp = _buffer(model, ids, plan) if keep_inputs else None
        self.quantized.copy_(_embeddings(model, ids, self.original))
        self.reference = _buffer(model, ids, plan).copy_(self.original) if reference else None
        self.served: dict[int, Served] = {}

    def advance_original(self, index: int, block: nn.Module, cache: CacheWatch | None = None) -> None:
        """X_fp <- block(X_fp); `cache` sees keys and values."""
        call = self.calls[index] if cache is None else with_cache(self.calls[index], cache)
        self._run(call, block, self._kept_inputs(), self.original)

    def advance_quantized(self, index: int, block: nn.Module) -> None:
        """X_q <- block(X_q)."""
        self._serve(index, block, self.quantized)

    def advance_reference(self, index: int, block: nn.Module) -> None:
        """The reference's hidden states through the block, whose weights must be the rounded ones."""
        if self.reference is not None:
            self._serve(index, block, self.reference)

    def _serve(self, index: int, block: nn.Module, states: Tensor) -> None:
        served = self.served.get(index, Served())
        with served.within(block):
            self._run(served.call(self.calls[index], self._device), block, states, states)

    def _kept_inputs(self) -> Tensor:
        """X_fp before the block, where it is not overwritten if a method needs it."""
        if self.inputs_fp is None:
            return self.original
        if self.original.is_cuda:
            # Steps that are captured once for all blocks find their targets where they were.
            return self.inputs_fp.copy_(self.original)
        self.original, self.inputs_fp = self.inputs_fp, self.original
        return self.inputs_fp

    def _run(self, call: BlockCall, block: nn.Module, source: Tensor, target: Tensor) -> None:
        run_block(call, block, source, target, micro_batch=self._pass_batch, device=self._device)

    def substitute(self, model: StreamedModel, given: Mapping[str, Tensor]) -> None:
        """Quantized embeddings in place of the original ones from now on, in X_q and in the reference; before block 0.

        given   dequantized, by parameter
        """
        self._given = given
        self._restart(model, given)
        if self.reference is not None:
            self.reference.copy_(self.quantized)

    def rewind(self, model: StreamedModel, given: Mapping[str, Tensor] | None = None) -> None:
        """X_q <- the embeddings, as before block 0. The kept inputs are let go.

        given   others than those that the quantized model has
        """
        self.inputs_fp = None
        self._restart(model, self._given if given is None else given)

    def _restart(self, model: StreamedModel, given: Mapping[str, Tensor]) -> None:
        there = {name: value.to(model.device) for name, value in given.items()}
        with model.loaded(*model.layout.outer, given=there):
            _embeddings(model, self._ids, self.quantized)

    def call(self, index: int) -> BlockCall:
        """The model's call of a block on these sequences."""
        return self.calls[index]

    @torch.no_grad()
    def squared_error(self) -> Tensor:
        """||Y - Y_hat||^2 and ||Y||^2 of the hidden states, fp64 (2,), on the device; nothing waits for it."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        rows = max(1, CHUNK_ELEMENTS[self._device.type] // max(1, self.original[:1].numel()))
        for pair in zip(torch.split(self.original, rows), torch.split(self.quantized, rows), strict=True):
            y, y_hat = (states.to(self._device, non_blocking=True).float() for states in pair)
            sums[0] += (y_hat - y).square_().sum(dtype=torch.float64)
            sums[1] += y.square().sum(dtype=torch.float64)
        return sums


def _buffer(model: StreamedModel, ids: Tensor, plan: Plan) -> Tensor:
    """Uninitialized hidden states of the sequences, where the plan has them."""
    on_device = plan.activations == "device"
    pinned = not on_device and model.device.type == "cuda"
    place = model.device if on_device else torch.device("cpu")
    return torch.empty(*ids.shape, model.width, dtype=model.dtype, device=place, pin_memory=pinned)


def _embeddings(model: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """The sequences' embeddings, written to `hidden`; the model's `outer` must be loaded."""
    for row in range(len(ids)):
        hidden[row] = model.embed(ids[row : row + 1].to(model.device))[0]
    return hidden


@contextmanager
def second_moments(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """sum over tokens of x_j^2 for the inputs of each linear, (in_features,): fp64 in the context, fp32 after it."""
    watch = _InputWatch()
    handles = [linear.register_forward_pre_hook(partial(watch, name)) for name, linear in linears.items()]
    try:
        yield watch.sums
    finally:
        for handle in handles:
            handle.remove()
    for name, total in watch.sums.items():
        watch.sums[name] = total.float()


@contextmanager
def counted_inputs(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, int]]:
    """Number of tokens that each linear is called on."""
    counts: dict[str, int] = dict.fromkeys(linears, 0)

    def count(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        counts[name] += arguments[0].shape[:-1].numel()

    handles = [linear.register_forward_pre_hook(partial(count, name)) for name, linear in linears.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def sum_moments(processes: ProcessGroup, moments: dict[str, Tensor], linears: Mapping[str, nn.Linear]) -> None:
    """Over all processes, inside the context of `second_moments`; one without a sequence adds zeros."""
    if processes.alone:
        return
    for name, linear in linears.items():
        zeros = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        processes.sum_(moments.setdefault(name, zeros))


class _InputWatch:
    """Sums up what linears are called with. What several get one after another (queries, keys, values) is summed once.

    sums    linear name -> fp64 (in_features,)
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002 - a hook
        x = arguments[0]
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = (x, x._version, column_squares(x.detach()))
        squares = self._last[2]
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares.clone()


def column_squares(x: Tensor) -> Tensor:
    """sum of x_j^2 over all dimensions but the last, fp64 (width,), without a copy of x in fp32."""
    rows = x.flatten(0, -2)
    if x.is_cuda:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        return norms.double().square()
    total = torch.zeros(x.shape[-1], dtype=torch.float64)
    for chunk in torch.split(rows, max(1, CHUNK_ELEMENTS["cpu"] // x.shape[-1])):
        total += chunk.float().square().sum(0)
    return total
