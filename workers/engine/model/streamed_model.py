"""A model whose weights come and go: built on meta, one block real at a time.

transformers builds the modules from the configuration without memory for weights (the meta device). Buffers such as
rotary frequencies are in no checkpoint; transformers' own initialization computes them. Those that are (the bias of a
router) are read when the model is opened, and stay. A block's weights are read for its turn
(`workers.engine.device.read_ahead` reads them a block early) and dropped after.

What the model passes to a block besides hidden states (masks, rotary embeddings, positions) depends on the sequence
length and on the block's layer type, not on the tokens (`workers.engine.model.dry_run` refuses a model where it does):
it is captured once a length for every block, in one pass in which stand-ins take the place of all blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from app.domain.inputs.architectures import find_architecture
from app.domain.inputs.config_numbers import check_numbers
from app.domain.inputs.left_alone import is_further_part
from workers.contracts.experts import experts_of
from workers.engine.model.block_calls import BlockCall, run_block, shared
from workers.engine.model.block_linears import BlockLinears, block_linears, kind_of
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.dry_run import LENGTH, walk_of
from workers.engine.model.experts import unfuse
from workers.engine.model.fused_blocks import FusedBlock, Parts
from workers.engine.model.fused_parts import fuse_parts, without_bands
from workers.engine.model.layouts import layout_of
from workers.engine.model.linear_forms import as_linears
from workers.engine.model.meta_model import configuration, empty_model, fuse_blocks, model_dtype
from workers.engine.model.names import Names
from workers.engine.model.overflow import weight_overflow
from workers.engine.model.stand_ins import Done, Reached, StandIn, imitated, parameter_places, stand_ins, swapped
from workers.numerics.causal_attention import Band

__all__ = ["BlockCall", "StreamedModel", "run_block"]


class StreamedModel:
    """A causal language model on `device` of which only the parts in use have memory.

    `left_out` are tensors of the checkpoint that nothing explains; its `checkpoint` is without them. What else it holds
    and the model does not (a vision tower, blocks that predict further tokens) goes into every export as it is.

    Raises (from `open`):
        UnsupportedArchitecture: its model_type is not accepted, or it cannot be followed block by block.
        CorruptCheckpoint: names or shapes of the checkpoint's tensors do not fit the architecture.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Names,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool = True,
    ) -> None:
        more = int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0)
        self.model = model
        self.dtype = dtype
        self.device = device
        self.layout = layout_of(model)
        self.left_out = tuple(name for name in names.foreign if not is_further_part(name, len(self.blocks), more))
        self.names = names.without(self.left_out).with_slices(unfuse(model, self.layout.blocks))
        self.checkpoint = self.names.checkpoint
        self.transposed = {f"{self.layout.blocks}.{name}" for name in as_linears(self.blocks)}
        self._fill_persistent_buffers()
        self.walk = walk_of(model, self.layout, device)
        self._linears = self._of_blocks()
        if fused:
            fuse_blocks(self.blocks, dtype, device)
            self._fuse_parts()

    @classmethod
    def open(cls, checkpoint: Checkpoint, device: torch.device, *, fused: bool = True) -> "StreamedModel":
        """Builds the modules without weights and checks every name and shape of the checkpoint against them.

        fused   False: all modules are transformers' own, which compute with a cache as well
        """
        find_architecture(checkpoint.config)
        return cls.unproved(checkpoint, device, fused=fused)

    @classmethod
    def unproved(cls, checkpoint: Checkpoint, device: torch.device, *, fused: bool = True) -> "StreamedModel":
        """The same of any type, accepted or not."""
        check_numbers(checkpoint.config)
        config = configuration(checkpoint)
        dtype = model_dtype(config, checkpoint)
        model = empty_model(config, dtype, device)
        names = Names.of(model, checkpoint, layout_of(model).blocks)
        return cls(model, names, dtype=dtype, device=device, fused=fused)

    def _fuse_parts(self) -> None:
        """Puts fused parts into blocks that no hand-fused one stands for, where there are parts for the device."""
        parts = Parts.on(self.device, self.dtype)
        if parts is not None and not all(isinstance(block, FusedBlock) for block in self.blocks):
            fuse_parts(self.blocks, parts, lambda index, length: self.capture_calls(length)[index].keywords)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def layer_types(self) -> frozenset[str]:
        """Kinds of its layers by transformers' names; empty where the configuration tells of none."""
        return frozenset(getattr(self.config.get_text_config(), "layer_types", None) or ())

    @property
    def tied(self) -> bool:
        """True if the head is the embedding matrix."""
        return f"{self.layout.head}.weight" in self.names.tied

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """Full parameter name -> the stored tensor that is it as it is; without those that come from others."""
        own = {name: self.names.own_name(name) for name in self.names.parameters}
        return {name: source for name, source in own.items() if source is not None}

    @property
    def width(self) -> int:
        """Of hidden states."""
        return self.walk.width

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.model.get_submodule(self.layout.head).weight.shape[0])

    @property
    def known_tokens(self) -> int:
        """Number of token ids."""
        return int(self.model.get_submodule(self.layout.embeddings).weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence, where the configuration names that."""
        named = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return named if isinstance(named, int) else None

    @property
    def embedding_width(self) -> int:
        """Columns of the matrix of embeddings."""
        return int(self.model.get_submodule(self.layout.embeddings).weight.shape[1])

    @property
    def blocks(self) -> nn.ModuleList:
        modules = self.model.get_submodule(self.layout.blocks)
        if not isinstance(modules, nn.ModuleList):
            raise TypeError(f"{self.layout.blocks} is {type(modules).__name__}, not ModuleList")
        return modules

    def block_linears(self, index: int) -> dict[str, nn.Linear]:
        """Linears of a block that may be quantized, by their names inside it; on meta unless the block is loaded."""
        block = self.blocks[index]
        return {name: _linear(block, name) for name in self._linears[index].names}

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear that may be quantized, by full module name: those of all blocks, and the head."""
        found = {
            f"{self.layout.block(index)}.{name}": linear
            for index in range(len(self.blocks))
            for name, linear in self.block_linears(index).items()
        }
        return found | {self.layout.head: _linear(self.model, self.layout.head)}

    def input_groups(self) -> list[tuple[str, ...]]:
        """Full names of linears that read the same input in the same part of a block, which runtimes may join."""
        return [
            tuple(f"{self.layout.block(index)}.{name}" for name in group)
            for index, linears in enumerate(self._linears)
            for group in linears.groups
        ]

    def joined(self, index: int) -> list[tuple[str, ...]]:
        """The same of one block, by names inside it; of experts, the linears that get an expert's input."""
        block = self.blocks[index]
        experts = [
            tuple(f"{part}.{expert}.{name}" if part else f"{expert}.{name}" for name in module.sides)
            for part, module in experts_of(block).items()
            for expert in range(module.number)
        ]
        known = {name for names in experts for name in names}
        return [names for names in self._linears[index].groups if known.isdisjoint(names)] + experts

    def _of_blocks(self) -> list[BlockLinears]:
        """Of every block, found once for each kind of block."""
        calls, found = self.capture_calls(LENGTH), dict[object, BlockLinears]()
        kinds = [(kind_of(block), len(list(call.leaves()))) for block, call in zip(self.blocks, calls, strict=True)]
        for kind, block, call in zip(kinds, self.blocks, calls, strict=True):
            if kind not in found:
                found[kind] = block_linears(block, call, (LENGTH, self.width), self.dtype)
        return [found[kind] for kind in kinds]

    def _fill_persistent_buffers(self) -> None:
        for name in self.names.buffers:
            owner, leaf = self._place(name)
            buffer = owner._buffers[leaf]
            assert buffer is not None  # noqa: S101 - for the type checker
            value = self.names.read(name)
            owner._buffers[leaf] = value.to(self.device, buffer.dtype if value.is_floating_point() else value.dtype)

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
        tensors, read, stored = {}, {}, self.names.reader()
        for parameter, _, _ in parameter_places(self.model, name):
            if parameter in given:
                tensors[parameter] = given[parameter]
            else:
                dtype = self._dtypes.get(parameter, self.dtype)
                tensors[parameter] = read[parameter] = upload(self._turned(parameter, stored(parameter)), dtype)
        self._demand_finite(read)
        return tensors

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """Of parameters that have another than the model's."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {name: weight.dtype for name, weight in parameters if weight.dtype != self.dtype}

    def _upload(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device, dtype)

    def _place(self, parameter: str) -> tuple[nn.Module, str]:
        owner, _, leaf = parameter.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def _turned(self, parameter: str, stored: Tensor) -> Tensor:
        return stored.T if parameter in self.transposed else stored

    def _demand_finite(self, weights: Mapping[str, Tensor]) -> None:
        """One pass over each weight without a copy, and one wait for the device in all."""
        if not weights:
            return
        # The smallest and the largest value: NaN if there is one.
        extremes = torch.stack([torch.stack(torch.aminmax(weight)) for weight in weights.values()])
        for parameter, is_finite in zip(weights, extremes.isfinite().all(1).tolist(), strict=True):
            if not is_finite:
                raise weight_overflow(parameter, self.names.read(parameter), self.dtype)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states before block 0, (batch, length, width); the layout's `outer` must be loaded."""
        return self.embedded(ids)

    def embedded(self, ids: Tensor) -> Tensor:
        """The same, through which autograd works."""
        if self.walk.embeds:
            hidden: Tensor = self.model.get_submodule(self.layout.embeddings)(ids)
            return hidden
        try:
            with self._stand_ins(stops=True):
                self.model.get_submodule(self.layout.decoder)(input_ids=ids, use_cache=False)
        except Reached as reached:
            return reached.hidden
        raise TypeError(f"{self.layout.decoder} has not called its first block")

    @torch.no_grad()
    def capture_calls(self, length: int) -> tuple[BlockCall, ...]:
        """Arguments of each block for sequences of `length` tokens; needs no weights.

        Blocks that are called with the same objects share one call, so that what is made for it serves them all.
        """
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        with imitated(self.model, self.layout.outer, self.device), self._stand_ins() as recorders:
            self.model.get_submodule(self.layout.decoder)(input_ids=ids, use_cache=False)
        bands: dict[int, Band | None] = {}
        calls = [
            BlockCall(call.arguments, without_bands(block, call.keywords, bands), self.walk.by_row)
            for block, recorder in zip(self.blocks, recorders, strict=True)
            for call in recorder.calls[:1]
        ]
        return shared(calls)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of hidden states after the last block; `after_blocks` must be loaded.

        What the model does after its decoder (a scale, a soft cap) is done by its own forward pass. Autograd works.
        Where the decoder does nothing but its norm after its blocks, no masks are made: many tokens cost no more than
        their logits.
        """
        norm = None if self.walk.norm is None else self.model.get_submodule(self.walk.norm)
        if not self.walk.plain:
            hidden = self._after_blocks(hidden)
        owner = self.model.get_submodule(self.layout.owner)
        inner = [name for name in self.layout.decoder.removeprefix(self.layout.body).split(".") if name]
        done = Done(self.model.get_submodule(self.layout.body), hidden, norm, inner)
        with swapped(self.model, self.layout.body, done):
            logits: Tensor = owner(inputs_embeds=hidden, use_cache=False).logits
        return logits

    @property
    def after_blocks(self) -> tuple[str, ...]:
        """Modules that `logits` needs of the model, by name."""
        last = tuple(name for name in self.layout.outer if name != self.layout.embeddings)
        if self.walk.plain:
            last = () if self.walk.norm is None else (self.walk.norm,)
        return (*last, self.layout.head)

    def _after_blocks(self, hidden: Tensor) -> Tensor:
        """Hidden states after everything that the decoder does behind its last block."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with imitated(self.model, self.layout.outer, self.device), self._stand_ins(hidden):
            states: Tensor = self.model.get_submodule(self.layout.decoder)(input_ids=ids, use_cache=False)[0]
        return states

    @contextmanager
    def _stand_ins(self, given: Tensor | None = None, *, stops: bool = False) -> Iterator[list[StandIn]]:
        with stand_ins(self.model, self.layout.blocks, self.walk.outputs, given, stops=stops) as recorders:
            yield recorders


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is {type(module).__name__}, not Linear")
    return module


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
