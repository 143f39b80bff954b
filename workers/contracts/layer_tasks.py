"""A block's linears as tasks of their own, in the order in which the block calls them.

Linears that are called one after another on the same input make one task: a small block that computes them side by
side, its output all theirs joined. Its targets are what the original linears make of X_fp, its inputs what the block
gives them on X_q once all linears before them are quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bitwright.errors import InvalidRequest
from workers.contracts.blocks import BlockTask
from workers.numerics.quantized import LinearResult

QuantizeLayers = Callable[[BlockTask], Mapping[str, LinearResult]]


class SideBySide(nn.Module):
    """Linears of one input under their own names: x (..., in) -> (..., sum of out)."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.names = tuple(linears)
        for name, linear in linears.items():
            *parents, last = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(last, _alike(linear))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in self.names], dim=-1)


def quantize_in_order(task: BlockTask, quantize: QuantizeLayers) -> dict[str, LinearResult]:
    """The results of `quantize` for each task of linears in turn; the block is left as it was.

    Raises:
        InvalidRequest: the block does not call a linear on hidden states of its own sequences (a mixture's experts).
    """
    layers = same_inputs(task)
    blocks = [SideBySide({name: task.linear(name) for name in names}) for names in layers]
    originals: dict[str, Tensor] = {name: task.linear(name).weight for names in layers for name in names}
    results: dict[str, LinearResult] = {}
    try:
        for number, (names, block) in enumerate(zip(layers, blocks, strict=True)):
            _put(task, originals)
            targets = _outputs(task, block, _inputs_of(task, names[0], task.inputs_fp))
            _put(task, {n: r.dequantize() for n, r in results.items()})
            tick = partial(_tick, task, number, len(layers))
            subtask = replace(
                task,
                block=block,
                forward=_call,
                inputs=_inputs_of(task, names[0], task.inputs),
                inputs_fp=torch.empty(0),
                targets=targets,
                schemes={name: task.schemes[name] for name in names},
                tick=tick,
                owns_sequences=True,
            )
            results |= quantize(subtask)
    finally:
        _put(task, originals)
    return results


@torch.no_grad()
def same_inputs(task: BlockTask) -> list[list[str]]:
    """Names of the task's linears in the order of their calls; those that get the same tensor in a row together."""
    order: list[tuple[str, Tensor]] = []
    sequence = task.inputs_fp[:1].to(task.device)
    with ExitStack() as hooks:
        for name in task.schemes:
            handle = task.linear(name).register_forward_pre_hook(_note(name, order))
            hooks.callback(handle.remove)
        task.forward(task.block, sequence)
    groups: list[list[str]] = []
    latest: Tensor | None = None
    for name, seen in order:
        if latest is seen:
            groups[-1].append(name)
        else:
            groups.append([name])
        latest = seen
    fitting = all(seen.shape[:-1] == sequence.shape[:-1] for _, seen in order)
    if sorted(name for name, _ in order) != sorted(task.schemes) or not fitting:
        raise InvalidRequest(
            "some linears do not see every token once and cannot be tuned one by one",
            field="quantization.granularity",
            value="layer",
            hint='set granularity to "block"',
        )
    return groups


def _note(name: str, order: list[tuple[str, Tensor]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG001 - a hook's signature
        order.append((name, arguments[0]))

    return note


@torch.no_grad()
def _inputs_of(task: BlockTask, name: str, hidden: Tensor) -> Tensor:
    """Inputs (sequences, length, in) of a linear on hidden states (sequences, length, width), in the same memory."""
    linear = task.linear(name)
    inputs = torch.empty(*hidden.shape[:2], linear.in_features, dtype=hidden.dtype, device=hidden.device)
    for first in range(0, len(hidden), task.micro_batch):
        rows, seen = slice(first, first + task.micro_batch), list[tuple[str, Tensor]]()
        handle = linear.register_forward_pre_hook(_note(name, seen))
        try:
            task.forward(task.block, hidden[rows].to(task.device))
        finally:
            handle.remove()
        inputs[rows] = seen[0][1].to(inputs.device)
    return inputs


@torch.no_grad()
def _outputs(task: BlockTask, block: SideBySide, inputs: Tensor) -> Tensor:
    batches: Sequence[Tensor] = torch.split(inputs, task.micro_batch)
    return torch.cat([block(rows.to(task.device)).to(inputs.device) for rows in batches])


def _tick(task: BlockTask, done: int, layers: int, share: float) -> None:
    task.tick((done + share) / layers)


def _put(task: BlockTask, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        whole = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        task.linear(name).weight = whole


def _alike(linear: nn.Linear) -> nn.Linear:
    """Another module with the same parameters: the first one's may be exchanged meanwhile."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    other.weight, other.bias = linear.weight, linear.bias
    return other


def _call(block: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    return block(hidden)
