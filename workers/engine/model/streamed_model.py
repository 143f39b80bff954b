"""A model whose weights come and go: built on meta, one block real at a time.

transformers builds the modules from the configuration without memory for weights (the meta device). Buffers such as
rotary frequencies are in no checkpoint; transformers' own initialization computes them. A block's weights are read
for its turn (`workers.engine.device.read_ahead` reads them a block early) and dropped after.

What the model passes to a block besides hidden states (masks, rotary embeddings, positions) depends on the sequence
length and on the block's layer type, not on the tokens: it is captured once a length for every block, in one pass in
which recorders stand in for all blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from app.domain.inputs.architectures import read_dimensions
from workers.contracts.blocks import BlockForward
from workers.engine.device.host_offload import in_transit
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.fused_blocks import FusedBlock, Parts
from workers.engine.model.fused_parts import fuse_parts, without_bands
from workers.engine.model.layouts import Layout, layout_of
from workers.engine.model.meta_model import configuration, empty_model, fuse_blocks, model_dtype, tensor_sources
from workers.engine.model.overflow import weight_overflow
from workers.numerics.causal_attention import Band


@dataclass(frozen=True)
class BlockCall:
    """Arguments that the model passes to one block besides the hidden states, for one sequence of a certain length."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """block(hidden, ...) for any batch (batch, length, width); of a tuple of outputs, the first."""
        output = block(hidden, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for calls with the very same objects."""
        return (*map(id, self.arguments), *((name, id(value)) for name, value in self.keywords.items()))


class StreamedModel:
    """A causal language model on `device` of which only the parts in use have memory.

    `left_out` are tensors of the checkpoint that the model does not have; its `checkpoint` is without them.

    Raises (from `open`):
        UnsupportedArchitecture: its model_type has no row in the table, or it needs code of its own.
        CorruptCheckpoint: names or shapes of the checkpoint's tensors do not fit the architecture.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        *,
        layout: Layout,
        sources: Mapping[str, str],
        dtype: torch.dtype,
        device: torch.device,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.left_out = left_out
        self.model = model
        self.layout = layout
        self.sources = sources
        self.dtype = dtype
        self.device = device

    @classmethod
    def open(cls, checkpoint: Checkpoint, device: torch.device) -> "StreamedModel":
        """Builds the modules without weights and checks every name and shape of the checkpoint against them."""
        layout = layout_of(checkpoint.config)
        read_dimensions(checkpoint.config)
        config = configuration(checkpoint)
        dtype = model_dtype(config, checkpoint)
        model = empty_model(config, dtype, device)
        fuse_blocks(model.get_submodule(layout.blocks), dtype, device)
        sources, foreign = tensor_sources(model, checkpoint, layout.blocks)
        kept = checkpoint.without(foreign)
        opened = cls(kept, model, layout=layout, sources=sources, dtype=dtype, device=device, left_out=tuple(foreign))
        opened._fuse_parts()
        return opened

    def _fuse_parts(self) -> None:
        """Puts fused parts into blocks that no hand-fused one stands for, where there are parts for the device."""
        parts = Parts.on(self.device, self.dtype)
        if parts is not None and not all(isinstance(block, FusedBlock) for block in self.blocks):
            fuse_parts(self.blocks, parts, lambda index, length: self.capture_calls(length)[index].keywords)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def tied(self) -> bool:
        """True if the head is the embedding matrix."""
        return f"{self.layout.head}.weight" not in self.sources

    @property
    def blocks(self) -> nn.ModuleList:
        modules = self.model.get_submodule(self.layout.blocks)
        if not isinstance(modules, nn.ModuleList):
            raise TypeError(f"{self.layout.blocks} is {type(modules).__name__}, not ModuleList")
        return modules

    def block_linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a block by their names inside it; on meta unless the block is loaded."""
        return {name: module for name, module in self.blocks[index].named_modules() if isinstance(module, nn.Linear)}

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear that may be quantized, by full module name: those of all blocks, and the head."""
        blocks, head = self.layout.blocks + ".", self.layout.head
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and (name.startswith(blocks) or name == head)
        }

    @contextmanager
    def loaded(self, *names: str, given: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[None]:
        """The modules of these names with their weights on the device; as they were afterwards.

        given   tensors that take the place of the checkpoint's, by full parameter name; those are not read

        Raises:
            NumericalFailure: a weight is not finite.
        """
        weights = {parameter: weight for name in names for parameter, weight in self.read(name, given).items()}
        with self.filled(weights):
            yield

    @contextmanager
    def filled(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Parameters with these weights, by full name; as they were afterwards. Takes the tensors out of `weights`.

        The parameters themselves come back, whatever stood in for them: some stages put in an empty tensor where a
        weight is never read, and shapes are asked for later.
        """
        places = [(*self._place(name), name) for name in weights]
        before = [module._parameters[leaf] for module, leaf, _ in places]
        for module, leaf, name in places:
            module._parameters[leaf] = _parameter(weights.pop(name))
        try:
            yield
        finally:
            for (module, leaf, _), parameter in zip(places, before, strict=True):
                module._parameters[leaf] = parameter

    def read(
        self,
        name: str,
        given: Mapping[str, Tensor] = MappingProxyType({}),
        upload: Callable[[Tensor, torch.dtype], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The weights of a module by full parameter name, on the device; changes nothing, so any thread may call it.

        given   tensors that take the place of the checkpoint's, by full parameter name; those are not read
        upload  brings a tensor to the device in a dtype

        Raises:
            NumericalFailure: a weight is not finite.
        """
        upload = upload or self._upload
        tensors, read = {}, {}
        for parameter in self._parameter_names(name):
            if parameter in given:
                tensors[parameter] = given[parameter]
            else:
                tensors[parameter] = read[parameter] = upload(self._stored(parameter), self.dtype)
        self._demand_finite(read)
        return tensors

    def _upload(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device, dtype)

    def _parameter_names(self, name: str) -> list[str]:
        modules = self.model.get_submodule(name).named_modules(prefix=name)
        return [
            f"{path}.{leaf}"
            for path, module in modules
            for leaf, weight in module._parameters.items()
            if weight is not None
        ]

    def _place(self, parameter: str) -> tuple[nn.Module, str]:
        owner, _, leaf = parameter.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def _stored(self, parameter: str) -> Tensor:
        if self.tied and parameter == f"{self.layout.head}.weight":
            parameter = f"{self.layout.embeddings}.weight"
        return self.checkpoint.read(self.sources[parameter])

    def _demand_finite(self, weights: Mapping[str, Tensor]) -> None:
        """One pass over each weight without a copy, and one wait for the device in all."""
        if not weights:
            return
        # The smallest and the largest value: NaN if there is one.
        extremes = torch.stack([torch.stack(torch.aminmax(weight)) for weight in weights.values()])
        for parameter, is_finite in zip(weights, extremes.isfinite().all(1).tolist(), strict=True):
            if not is_finite:
                raise weight_overflow(parameter, self._stored(parameter), self.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states before block 0, (batch, length, width); the embeddings must be loaded."""
        hidden: Tensor = self.model.get_submodule(self.layout.embeddings)(ids)
        return hidden

    @torch.no_grad()
    def capture_calls(self, length: int) -> tuple[BlockCall, ...]:
        """Arguments of each block for sequences of `length` tokens; needs no weights.

        Blocks that are called with the same objects share one call, so that what is made for it serves them all.
        """
        decoder = self.model.get_submodule(self.layout.decoder)
        hidden = torch.zeros(1, length, self._width, dtype=self.dtype, device=self.device)
        with self._stand_ins() as recorders, self._swapped(self.layout.final_norm, nn.Identity()):
            decoder(inputs_embeds=hidden, use_cache=False)
        bands: dict[int, Band | None] = {}
        calls = [
            BlockCall(arguments, without_bands(block, keywords, bands))
            for block, recorder in zip(self.blocks, recorders, strict=True)
            for arguments, keywords in recorder.calls[:1]
        ]
        first = {call.identity: call for call in reversed(calls)}
        return tuple(first[call.identity] for call in calls)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of hidden states after the last block; norm and head must be loaded.

        The model's own forward runs with blocks that pass their input on, so that whatever it does around norm and
        head (Gemma's soft cap) is done.
        """
        with self._stand_ins():
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits

    def head_logits(self, hidden: Tensor) -> Tensor:
        """`logits` without the decoder: its norm, then what the model does after it. Autograd works.

        No masks are made, so that many tokens cost no more than their logits. Equal to `logits` where the decoder does
        nothing but its norm after its blocks.
        """
        norm = self.model.get_submodule(self.layout.final_norm)
        with self._swapped(self.layout.decoder, _Normed(norm)):
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits

    @property
    def _width(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @contextmanager
    def _stand_ins(self) -> Iterator[list["_Recorder"]]:
        blocks = self.blocks
        recorders = [_Recorder(block) for block in blocks]
        parent, _, leaf = self.layout.blocks.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, leaf, nn.ModuleList(recorders))
        try:
            yield recorders
        finally:
            setattr(owner, leaf, blocks)

    @contextmanager
    def _swapped(self, name: str, module: nn.Module) -> Iterator[None]:
        parent, _, leaf = name.rpartition(".")
        owner, original = self.model.get_submodule(parent), self.model.get_submodule(name)
        setattr(owner, leaf, module)
        try:
            yield
        finally:
            setattr(owner, leaf, original)


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not a submodule: the model asks a block for plain attributes such as its attention type.
        object.__setattr__(self, "block", block)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.calls.append((arguments, keywords))
        return hidden


class _Normed(nn.Module):
    """Stands in for a decoder whose blocks are done."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


@torch.no_grad()
def run_block(
    forward: BlockForward, block: nn.Module, source: Tensor, target: Tensor, *, micro_batch: int, device: torch.device
) -> None:
    """target[i] = block(source[i]) for all sequences, `micro_batch` at a time; the two may be the same tensor.

    Waits for a GPU only at the end, and only where the target is in host memory.
    """
    if not len(source):
        return
    if device.type == "cuda" and not source.is_cuda and not target.is_cuda:
        in_transit(partial(forward, block), source, target, rows=micro_batch, device=device)
        return
    for before, after in zip(torch.split(source, micro_batch), torch.split(target, micro_batch), strict=True):
        after.copy_(forward(block, before.to(device)))


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
