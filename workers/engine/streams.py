"""The two streams: the same windows through the original blocks and through the quantized ones.

    X_fp, X_q   (samples, length, width), the model's dtype, on the device or in (pinned) host memory

The target of block k is block_k(X_fp), and the quantized block sees X_q, so that each block also corrects the error of
the blocks before it. Before block 0 both are the embeddings.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workers.engine.blocks import BlockCall, StreamedModel, run_block
from workers.engine.plan import Plan

CHUNK_ELEMENTS = 1 << 24
"""Elements that are held in fp32 at a time when errors are summed."""


class Stream:
    """One set of windows in both streams.

    original    X_fp; after `advance_original`, the original block's output
    inputs_fp   X_fp before the block, kept only where a method needs it
    quantized   X_q; after `advance_quantized`, the quantized block's output
    """

    def __init__(self, model: StreamedModel, ids: Tensor, plan: Plan, *, keep_inputs: bool) -> None:
        self._device = model.device
        self._ids = ids
        self._micro_batch = plan.micro_batch
        self.calls = model.capture_calls(ids.shape[1])
        self.original = _embeddings(model, ids, _buffer(model, ids, plan))
        self.quantized = self.original.clone()
        self.inputs_fp = torch.empty_like(self.original) if keep_inputs else self.original

    def advance_original(self, index: int, block: nn.Module) -> None:
        """X_fp <- block(X_fp)."""
        if self.inputs_fp is not self.original:
            self.original, self.inputs_fp = self.inputs_fp, self.original
        run_block(
            self.calls[index], block, self.inputs_fp, self.original, micro_batch=self._micro_batch, device=self._device
        )

    def advance_quantized(self, index: int, block: nn.Module) -> None:
        """X_q <- block(X_q)."""
        run_block(
            self.calls[index], block, self.quantized, self.quantized, micro_batch=self._micro_batch, device=self._device
        )

    def rewind(self, model: StreamedModel) -> None:
        """X_q <- the embeddings, as before block 0; the embedding matrix must be loaded. The kept inputs are let go."""
        self.inputs_fp = self.original
        _embeddings(model, self._ids, self.quantized)

    def call(self, index: int) -> BlockCall:
        """How the model calls a block on these windows."""
        return self.calls[index]

    @torch.no_grad()
    def output_error(self) -> float:
        """||Y - Y_hat|| / ||Y|| of the streams as they are."""
        difference = total = 0.0
        rows = max(1, CHUNK_ELEMENTS // max(1, self.original[0].numel()))
        for start in range(0, len(self.original), rows):
            y = self.original[start : start + rows].float()
            difference += float((y - self.quantized[start : start + rows].float()).square().sum(dtype=torch.float64))
            total += float(y.square().sum(dtype=torch.float64))
        return (difference / total) ** 0.5 if total else 0.0


def _buffer(model: StreamedModel, ids: Tensor, plan: Plan) -> Tensor:
    """Uninitialized hidden states of the windows, where the plan has them."""
    width = model.config.get_text_config().hidden_size
    on_device = plan.activations == "device"
    pinned = not on_device and model.device.type == "cuda"
    place = model.device if on_device else torch.device("cpu")
    return torch.empty(*ids.shape, width, dtype=model.dtype, device=place, pin_memory=pinned)


def _embeddings(model: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """The windows' embeddings, written to `hidden`; the embedding matrix must be loaded."""
    for row in range(len(ids)):
        hidden[row] = model.embed(ids[row : row + 1].to(model.device))[0]
    return hidden


@contextmanager
def second_moments(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """sum over tokens of x_j^2 for the inputs of each linear, fp32 (in_features,), while the context lasts."""
    sums: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG001 - a hook's signature
            squares = arguments[0].detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    try:
        handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
        yield sums
    finally:
        for handle in handles:
            handle.remove()
