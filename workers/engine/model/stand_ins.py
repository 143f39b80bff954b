"""Stand-ins for blocks, for the decoder, and for weights that are not there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from workers.engine.model.block_calls import BlockCall


class Reached(Exception):
    """Ends a forward pass at the first block, with the hidden states that it would have got."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class StandIn(nn.Module):
    """Stands in for a block: notes what it is called with, and passes hidden states on.

    outputs   length of the tuple that the block returns; 0 for a tensor alone
    given     hidden states to pass on in place of those that it gets
    beside    what it returns besides hidden states
    """

    beside: object = None

    def __init__(self, block: nn.Module, outputs: int, given: Tensor | None, *, stops: bool) -> None:
        super().__init__()
        # Not a submodule: the model asks a block for plain attributes such as its attention type.
        object.__setattr__(self, "block", block)
        self.outputs, self.given, self.stops = outputs, given, stops
        self.calls: list[BlockCall] = []
        self.received: Tensor | None = None
        self.passed: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden, *others = arguments if arguments else (keywords.pop("hidden_states"),)
        if self.stops:
            raise Reached(hidden)
        self.calls.append(BlockCall(tuple(others), keywords))
        self.received = hidden
        self.passed = hidden if self.given is None else self.given
        return (self.passed, *[self.beside] * (self.outputs - 1)) if self.outputs else self.passed


@contextmanager
def stand_ins(
    model: nn.Module, blocks: str, outputs: int, given: Tensor | None = None, *, stops: bool = False
) -> Iterator[list[StandIn]]:
    """Stand-ins in place of all blocks; `given` is what the last one passes on, with `stops` the first one ends."""
    originals = list(model.get_submodule(blocks).children())
    inner = [StandIn(block, outputs, None, stops=stops) for block in originals[:-1]]
    recorders = [*inner, *(StandIn(block, outputs, given, stops=stops) for block in originals[-1:])]
    with swapped(model, blocks, nn.ModuleList(recorders)):
        yield recorders


@contextmanager
def swapped(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Another module of that name while the context lasts."""
    parent, _, leaf = name.rpartition(".")
    owner, original = model.get_submodule(parent), model.get_submodule(name)
    setattr(owner, leaf, module)
    try:
        yield
    finally:
        setattr(owner, leaf, original)


class Answered(BaseModelOutputWithPast):  # type: ignore[misc]
    """Output of a decoder; whatever else a model's head asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Done(nn.Module):
    """Stands in for a decoder that has run: whatever it is called with, `states` come out, through `last` if given.

    inner   names of the modules inside of it on the way to the decoder, which some models call past it
    """

    def __init__(self, done: nn.Module, states: Tensor, last: nn.Module | None, inner: Iterable[str] = ()) -> None:
        super().__init__()
        # Not as submodules: it would be its own. A head asks its decoder for plain attributes, too.
        self.__dict__.update(dict.fromkeys(inner, self), done=done, last=last)
        self.states = states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["done"], name)

    def forward(self, *_: Any, **__: Any) -> Answered:
        return Answered(last_hidden_state=self.states if self.last is None else self.last(self.states))


def parameter_places(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, owner and last name of the parameter of that name, or of each parameter in the module of that name."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if owner._parameters.get(leaf) is not None:
        yield name, owner, leaf
        return
    for path, module in model.get_submodule(name).named_modules(prefix=name):
        for leaf, weight in module._parameters.items():
            if weight is not None:
                yield f"{path}.{leaf}", module, leaf


@contextmanager
def imitated(model: PreTrainedModel, names: Iterable[str], device: torch.device) -> Iterator[None]:
    """Numbers in place of the parameters of these modules that are on meta: different ones in every row, in next to no
    memory.
    """
    owners = [(module, leaf) for name in names for _, module, leaf in parameter_places(model, name)]
    places = [(module, leaf, weight) for module, leaf in owners if (weight := module.get_parameter(leaf)).is_meta]
    generator = torch.Generator().manual_seed(0)
    try:
        for module, leaf, weight in places:
            numbers = torch.rand(sum(weight.shape), generator=generator).to(device, weight.dtype) + 0.5
            value = numbers.as_strided(weight.shape, [1] * weight.dim())
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, leaf, weight in places:
            module._parameters[leaf] = weight
