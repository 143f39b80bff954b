"""Linears of a block that are quantized, and groups of them that read one input.

A linear is quantized if the block calls it, once, and no rule below leaves it alone. Some modules use a linear's weight
without calling it: what is put in its place would not be seen.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.inputs.left_alone import left_alone
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.stand_ins import imitated


@dataclass(frozen=True)
class BlockLinears:
    """Names of a block's linears that are quantized, and groups of those that read one input in one part of it."""

    names: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]


def kind_of(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks whose linears are called alike."""
    parts = [(name, type(module).__name__) for name, module in block.named_modules()]
    return (type(block), *parts)


@torch.no_grad()
def block_linears(block: nn.Module, call: BlockCall, shape: tuple[int, int], dtype: torch.dtype) -> BlockLinears:
    """Of a block without weights, by a call without numbers; where that fails, with invented ones.

    shape   (length, width) of the hidden states that the call was captured with
    """
    linears = {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) and not left_alone(name)
    }
    calls: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for name, linear in linears.items():
            note = _note(name, calls)
            stack.callback(linear.register_forward_pre_hook(note).remove)
        try:
            _run_on_meta(block, call, shape, dtype)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            calls.clear()
            _run_imitated(block, call, shape, dtype)
    counts: dict[str, int] = {}
    for name, _ in calls:
        counts[name] = counts.get(name, 0) + 1
    kept = tuple(name for name in linears if counts.get(name) == 1 or _is_routed(name))
    groups: dict[tuple[int, str], list[str]] = {}
    for name, seen in calls:
        if name in kept:
            groups.setdefault((id(seen), name.rpartition(".")[0]), []).append(name)
    return BlockLinears(kept, tuple(tuple(names) for names in groups.values()))


def _is_routed(name: str) -> bool:
    """True if a linear is an expert's, which sees only the tokens that a router sends."""
    return "experts" in name.split(".")


def _note(name: str, calls: list[tuple[str, Tensor]]) -> Any:
    return lambda _, given: calls.append((name, given[0]))


def _run_on_meta(block: nn.Module, call: BlockCall, shape: tuple[int, int], dtype: torch.dtype) -> None:
    hidden = torch.empty(1, *shape, dtype=dtype, device="meta")
    with _buffers_on_meta(block):
        call.changed(lambda _, value: value.to("meta") if isinstance(value, Tensor) else value)(block, hidden)


def _run_imitated(block: nn.Module, call: BlockCall, shape: tuple[int, int], dtype: torch.dtype) -> None:
    device = next((v.device for _, v in call.leaves() if isinstance(v, Tensor)), torch.device("cpu"))
    holder = nn.ModuleDict({"block": block})
    with imitated(holder, ["block"], device):
        numbers = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
        call(block, numbers.to(device, dtype))


@contextmanager
def _buffers_on_meta(block: nn.Module) -> Iterator[None]:
    places = [(m, leaf, b) for m in block.modules() for leaf, b in m._buffers.items() if b is not None]
    try:
        for module, leaf, buffer in places:
            module._buffers[leaf] = buffer.to("meta")
        yield
    finally:
        for module, leaf, buffer in places:
            module._buffers[leaf] = buffer
