"""Stored tensors that fill each parameter and persistent buffer of a model, and back: names and layouts both ways.

transformers renames, merges, cuts and transposes tensors as it loads a checkpoint: experts that lie one by one in a
file are one tensor of a module. Its own transforms are run here (`workers.engine.model.conversions`), never a table of
names. When names are taken, every conversion is run both ways on tensors without memory: names and shapes must be
those of the file and of the model.

A part of a fused parameter may have a name of its own (`Slice`), such as one expert's matrix; where the file holds that
part by itself, it is read alone.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.errors import CorruptCheckpoint
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.conversion_checks import expected_names, fitted_conversions
from workers.engine.model.conversions import Conversion, Read, Skeletal, Slice, grouped
from workers.engine.model.foreign_tensors import Skeleton, demand_a_model

NOTHING: Mapping[str, Any] = MappingProxyType({})
OLD_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
"""In old Llama checkpoints; the model computes them."""


@dataclass(frozen=True)
class Names:
    """Names of a model's parameters and persistent buffers against those of a checkpoint, both ways.

    conversions  by name in the model; parameters of one conversion share it
    buffers      persistent buffers that the checkpoint fills
    tied         parameter without a tensor of its own -> the one that it is tied to
    foreign      stored tensors that fill nothing
    ignored      besides those, what transformers leaves aside by a pattern of the model, and stored copies of tied ones
    slices       further names: parts of fused parameters
    """

    checkpoint: Checkpoint
    model: Skeletal
    conversions: Mapping[str, Conversion]
    buffers: tuple[str, ...]
    tied: Mapping[str, str]
    foreign: tuple[str, ...]
    ignored: tuple[str, ...]
    slices: Mapping[str, Slice] = field(default_factory=lambda: NOTHING)

    @classmethod
    def of(cls, model: PreTrainedModel, checkpoint: Checkpoint, blocks: str) -> "Names":
        """The names of a model whose parameters are on meta; `blocks` is the name of its list of decoder blocks.

        Raises:
            CorruptCheckpoint: a parameter has no tensor, a tensor of a block fills none, or their shapes differ.
            UnsupportedArchitecture: the weights are quantized already, or their names do not come back.
            UnsupportedCheckpoint: an adapter is not merged.
        """
        groups = grouped(model, list(checkpoint.tensors))
        if groups.doubled:
            raise _doubled(*groups.doubled[0])
        tied = dict(model.all_tied_weights_keys)
        fitted, broken = fitted_conversions(groups, checkpoint, buffers={name for name, _ in model.named_buffers()})
        expected = [(conversion, expected_names(conversion, groups.model)) for conversion in broken]
        missing = [name for conversion, names in expected for name in names if name not in conversion.names]
        foreign = [name for conversion, names in expected for name in conversion.names if name not in names]
        ignored = [name for name, target in groups.others.items() if _is_ignored(model, target)]
        foreign += [name for name in groups.others if name not in ignored]
        conversions = {name: conversion for conversion in fitted for name in conversion.parameters}
        missing += _unfilled(model, {*conversions, *(name for c in broken for name in c.parameters)}, tied)
        layers = sum(1 for _ in model.get_submodule(blocks).children())
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        skeleton = Skeleton(parameters, blocks, layers, tied_head=bool(tied))
        demand_a_model(skeleton, foreign, missing, {name: t.dtype for name, t in checkpoint.tensors.items()})
        buffers = tuple(name for name, _ in model.named_buffers() if name in conversions)
        names = cls(checkpoint, groups.model, conversions, buffers, {}, tuple(foreign), tuple(ignored))
        return names._settled(tied)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Everything that `read` knows, tied names and fused parameters that gave way to slices left out."""
        return (*(name for name in self.conversions if name not in self._sliced), *self.slices)

    def with_slices(self, slices: Mapping[str, Slice]) -> "Names":
        """The same where fused parameters have given way to their parts."""
        return replace(self, slices={**self.slices, **slices})

    def without(self, names: Collection[str]) -> "Names":
        """The same on a checkpoint as if it did not hold these stored tensors."""
        return replace(self, checkpoint=self.checkpoint.without(names))

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """The stored tensors that a parameter's value comes from."""
        own = self.own_name(parameter)
        piece = self.slices.get(parameter)
        conversion = self._conversion(parameter if piece is None else piece.parameter)
        return conversion.names if own is None else (own,)

    def own_name(self, parameter: str) -> str | None:
        """The stored tensor that is the parameter as it is; None where the parameter comes from others or is a part."""
        piece = self.slices.get(parameter)
        if piece is not None:
            return self._stored_part(piece)
        conversion = self._conversion(parameter)
        return conversion.names[0] if conversion.converter is None else None

    def linear_name(self, linear: str) -> str:
        """Name of a linear in the checkpoint, without `.weight`: the file's own where it holds the weight by itself.

        A part of a fused tensor has the name that transformers' conversion would merge it from, if there is one, else
        that of the module.
        """
        return (self._name_by_itself(linear) or linear).removesuffix(".weight")

    def module_name(self, module: str) -> str:
        """Name of a module of a block in the checkpoint, as the names of its parameters show it; else its own."""
        for parameter in self.parameters:
            own = self.own_name(parameter) if parameter.startswith(module + ".") else None
            if own is not None and own.endswith(below := parameter.removeprefix(module)):
                return own.removesuffix(below)
        return module

    def has_name(self, linear: str) -> bool:
        """True if loaders find a linear's weight by itself, in this file or in one that transformers would merge."""
        return self._name_by_itself(linear) is not None

    def _name_by_itself(self, linear: str) -> str | None:
        own, piece = self.own_name(f"{linear}.weight"), self.slices.get(f"{linear}.weight")
        if own is None and piece is not None:
            return self._alone.get(piece.parameter, {}).get((piece.index, piece.part(self._rows(piece))))
        return own

    def place(self, parameter: str) -> tuple[str, Slice] | None:
        """The stored tensor that holds a parameter as a part, and where; None where there is none."""
        piece = self.slices.get(parameter)
        whole = None if piece is None or self.own_name(parameter) is not None else self.own_name(piece.parameter)
        return None if piece is None or whole is None else (whole, piece)

    def stored_bytes(self, parameter: str) -> int:
        """Bytes that a parameter takes in the checkpoint."""
        stored = [self.checkpoint.tensors[name] for name in self.stored_names(parameter)]
        piece = self.slices.get(parameter)
        if piece is None or self.own_name(parameter) is not None:
            return sum(tensor.size for tensor in stored)
        shape = self.model.state[piece.parameter].shape
        share = piece.of(self.model.state[piece.parameter]).numel() / shape.numel()
        return round(share * sum(tensor.size for tensor in stored))

    @cached_property
    def _alone(self) -> dict[str, dict[tuple[int, object], str]]:
        """Of fused parameters that lie fused in the file: the names that transformers would merge, by part."""
        return {name: self.model.alone(name) for name in self._sliced if self.conversions[name].converter is None}

    def _rows(self, piece: Slice) -> int:
        shape = self.model.state[piece.parameter].shape
        return shape[-1] if piece.transposed else shape[1]

    def together(self, parameter: str) -> tuple[str, ...]:
        """The parameters that `write` needs all at once to make the stored tensors of this one."""
        piece = self.slices.get(parameter)
        if piece is not None and self._stored_part(piece) is not None:
            return (parameter,)
        family = self._conversion(parameter if piece is None else piece.parameter).parameters
        return tuple(name for whole in family for name in self._sliced.get(whole, (whole,)))

    def read(self, parameter: str) -> Tensor:
        """A parameter's value on the host, in the dtype of the file; mapped from it where nothing has to be joined.

        Raises:
            CorruptCheckpoint: the file does not hold what its header says.
        """
        return self.reader()(parameter)

    def reader(self) -> Read:
        """`read` for the parameters of one module: what several come from is read and made once while this lives."""
        made: dict[int, dict[str, Tensor]] = {}

        def whole(parameter: str) -> Tensor:
            conversion = self._conversion(parameter)
            if id(conversion) not in made:
                values = conversion.values(self.checkpoint.read, self.model)
                if len(conversion.parameters) == 1 and parameter not in self._sliced:
                    return values[parameter]
                made[id(conversion)] = values
            return made[id(conversion)][parameter]

        def read(parameter: str) -> Tensor:
            own, piece = self.own_name(parameter), self.slices.get(parameter)
            if own is not None:
                return self.checkpoint.read(own)
            if piece is None:
                return whole(self.tied.get(parameter, parameter))
            return piece.of(whole(piece.parameter)).contiguous()

        return read

    def write(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored name -> tensor in the layout of the file, from parameters' values; all that `together` names at once.

        Raises:
            KeyError: a parameter is missing whose tensor others share.
        """
        stored: dict[str, Tensor] = {}
        wholes: dict[str, Tensor] = {}
        for parameter, value in values.items():
            own, piece = self.own_name(parameter), self.slices.get(parameter)
            if own is not None:
                stored[own] = value
            elif piece is None:
                wholes[parameter] = value
            elif piece.parameter not in wholes:
                wholes[piece.parameter] = self._joined(piece.parameter, values)
        for conversion in {id(c): c for c in map(self._conversion, wholes)}.values():
            shapes = {name: self.checkpoint.tensors[name].shape for name in conversion.names}
            stored |= conversion.back({name: wholes[name] for name in conversion.parameters}, shapes, self.model)
        return stored

    def _joined(self, parameter: str, values: Mapping[str, Tensor]) -> Tensor:
        """A fused parameter from its parts."""
        parts = self._sliced[parameter]
        first = values[parts[0]]
        whole = torch.empty(self.model.state[parameter].shape, dtype=first.dtype, device=first.device)
        for name in parts:
            self.slices[name].of(whole).copy_(values[name])
        return whole

    @cached_property
    def _sliced(self) -> dict[str, list[str]]:
        """Fused parameter -> the names of its parts."""
        parts: dict[str, list[str]] = defaultdict(list)
        for name, piece in self.slices.items():
            parts[piece.parameter].append(name)
        return dict(parts)

    def _conversion(self, parameter: str) -> Conversion:
        return self.conversions[self.tied.get(parameter, parameter)]

    def _stored_part(self, piece: Slice) -> str | None:
        shape = self.model.state[piece.parameter].shape
        conversion = self.conversions[piece.parameter]
        if conversion.converter is None or len(shape) < 3:
            return None
        return conversion.stored_part(piece, shape[1])

    def _settled(self, tied: Mapping[str, str]) -> "Names":
        """Tied parameters without conversions of their own; a stored copy must be one.

        Raises:
            CorruptCheckpoint: it differs from what config.json ties it to.
        """
        conversions, aside = dict(self.conversions), list(self.ignored)
        for copy, original in tied.items():
            if copy not in conversions:
                continue
            if original not in conversions:
                conversions[original] = replace(conversions.pop(copy), parameters=(original,))
                continue
            if not torch.equal(self.read(copy), self.read(original)):
                raise CorruptCheckpoint(
                    f"config.json ties {copy} to {original}, but the checkpoint's tensors differ",
                    field="model",
                    value=self.stored_names(copy)[0],
                    hint="set tie_word_embeddings to false in config.json, or remove the extra tensor",
                )
            aside += conversions.pop(copy).names
        return replace(self, conversions=conversions, tied=dict(tied), ignored=tuple(aside))


def _unfilled(model: PreTrainedModel, filled: Collection[str], tied: Mapping[str, str]) -> list[str]:
    """Parameters and persistent buffers without a tensor, but for what is computed: buffers with different values."""
    computed = {name for name, buffer in model.named_buffers() if not buffer.is_meta and _varies(buffer)}
    lacking = [name for name in model.state_dict() if name not in filled and name not in computed]
    reached = {name for pair in tied.items() if set(pair) & set(filled) for name in pair}
    return [name for name in lacking if name not in reached]


def _varies(buffer: Tensor) -> bool:
    return buffer.numel() > 1 and bool((buffer != buffer.flatten()[0]).any())


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """True for names that transformers itself leaves aside where they fill nothing."""
    patterns = [*map(re.compile, model._keys_to_ignore_on_load_unexpected or ()), OLD_FREQUENCIES]
    return any(pattern.search(name) for pattern in patterns)


def _doubled(parameter: str, first: str, second: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the tensors {first} and {second} are both the parameter {parameter}",
        field="model",
        value=second,
        hint="remove one of them; transformers loads either, by the order of their names",
    )
