"""Calls of blocks as their model makes them: captured once a length, made again for any batch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.contracts.blocks import BlockForward
from workers.engine.device.host_offload import in_transit
from workers.engine.device.quick_products import quick_products


@dataclass(frozen=True)
class BlockCall:
    """Arguments that the model passes to one block besides the hidden states, for one sequence of a certain length.

    by_row   paths of arguments whose first dimension is sequences times something (`leaves`): a batch needs them
             repeated, where all others serve any number of sequences as they are
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    by_row: frozenset[str] = frozenset()
    _repeated: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict, compare=False)

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """block(hidden, ...) for any batch (batch, length, width); of a tuple of outputs, the first."""
        arguments, keywords = self._for(len(hidden)) if self.by_row else (self.arguments, self.keywords)
        output = block(hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for calls with the very same objects."""
        return (*map(id, self.arguments), *((name, id(value)) for name, value in self.keywords.items()))

    def leaves(self) -> Iterator[tuple[str, object]]:
        """Every argument by its path: those inside of tuples, lists and mappings one by one."""
        yield from _leaves("", self.arguments)
        yield from _leaves("", self.keywords)

    def changed(self, change: Callable[[str, Any], Any]) -> "BlockCall":
        """The call with each leaf as `change` makes it of path and value."""
        arguments, keywords = _changed("", self.arguments, change), _changed("", self.keywords, change)
        return BlockCall(arguments, keywords, self.by_row)

    def _for(self, rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if rows not in self._repeated:

            def repeat(path: str, value: Any) -> Any:
                return torch.cat([value] * rows) if path in self.by_row else value

            repeated = self.changed(repeat)
            self._repeated[rows] = (repeated.arguments, repeated.keywords)
        return self._repeated[rows]


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _leaves(f"{path}.{index}", entry)
    elif type(value) is dict:
        for name, entry in value.items():
            yield from _leaves(f"{path}.{name}", entry)
    else:
        yield path.removeprefix("."), value


def _changed(path: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_changed(f"{path}.{index}", entry, change) for index, entry in enumerate(value)])
    if type(value) is dict:
        return {name: _changed(f"{path}.{name}", entry, change) for name, entry in value.items()}
    return change(path.removeprefix("."), value)


def in_dtype(dtype: torch.dtype, forward: BlockForward, block: Callable[..., Any], hidden: Tensor) -> Any:
    """`forward` of block and hidden states in `dtype`, with the floating-point arguments of the call in it, too."""

    def widened(_: str, value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def called(states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return block(states, *_changed("", arguments, widened), **_changed("", keywords, widened))

    return forward(called, hidden)


def shared(calls: list[BlockCall]) -> tuple[BlockCall, ...]:
    """The same calls; blocks that are called with the same objects share one: what is made for it serves them all."""
    first = {call.identity: call for call in reversed(calls)}
    return tuple(first[call.identity] for call in calls)


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
    with quick_products(block):
        for before, after in zip(torch.split(source, micro_batch), torch.split(target, micro_batch), strict=True):
            after.copy_(forward(block, before.to(device)))


def plain_value(value: object) -> bool:
    """True if an argument cannot carry anything from one block to another."""
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def named(leaves: Mapping[str, object]) -> str:
    """Paths of arguments, for a message."""
    return ", ".join(sorted(leaves))
