"""Empirical Fisher information of every linear's weight, with one block's weights in memory at a time.

    F_ij = sum over sequences of (dL/dW_ij)^2,   L = -sum_t log p(x_{t+1})   of one sequence of the calibration text

Of F only the sums over rows and columns are kept (`workers.contracts.blocks.Fisher`). One pass over the text serves
all blocks: as many sequences as fit go forward through all of them, with the hidden states before every block kept, on
a GPU that has room for them or on the host; then back, block by block. No graph outlives a block. The loss is a sum
over tokens, not a mean: its gradients are of a size that half precision holds.

Several sequences go back through a block at once. A linear that sees them as they are, inputs X_s (length, in) and
gradients D_s (length, out) by its outputs, has the gradient D_s^T X_s for sequence s: one batched product, squared,
summed and dropped. Where tokens of several sequences lie together, as those of an expert do, or a linear is not called,
sequences go back one at a time, and autograd makes the gradients by weights.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bitwright.errors import NumericalFailure
from workers.contracts.blocks import Fisher
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.memory import FISHER_SHARE, LOGITS_AT_ONCE, SQUARES_AT_ONCE, device_memory
from workers.engine.model.block_calls import BlockCall, run_block
from workers.engine.model.overflow import original_overflows
from workers.engine.model.streamed_model import StreamedModel
from workers.machine import host_memory


def empirical_fisher(
    model: StreamedModel,
    ids: Tensor,
    names: Collection[str],
    micro_batch: int,
    tick: Callable[[float], None],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Fisher]:
    """Of the matrices of these full names, on token ids (sequences, length), each rank's own; on the host.

    names   of linears of the blocks, and of the head or the embeddings: of a matrix that is both, as the embeddings
    """
    calls, blocks = model.capture_calls(ids.shape[1]), len(model.blocks)
    sums: dict[str, Fisher] = {}
    at_once = sequences_at_once(model, ids.shape[1])
    for start in range(0, len(ids), at_once):
        batch = ids[start : start + at_once]
        states = _forward(model, calls, batch, micro_batch)
        gradient = _loss_gradient(model, states.pop(), batch, _head_of(model, names), sums)
        for index in reversed(range(blocks)):
            wanted = [name for name in model.block_linears(index) if f"{model.layout.block(index)}.{name}" in names]
            _backward(model, calls[index], index, wanted, states.pop(), gradient, sums, micro_batch)
            tick((start + len(batch) * (blocks - index) / blocks) / len(ids))
        if model.layout.embeddings in names:
            _embeddings_backward(model, batch, gradient, sums)
    for name in sorted(names):  # the same order on every rank
        processes.sum_(sums[name].rows, sums[name].columns)
        if not sums[name].rows.isfinite().all():
            detail = f"the original model's gradients by {name} are not finite in {model.dtype}"
            hint = 'set "dtype" to "bfloat16" in the model\'s config.json, or fisher to false'
            raise NumericalFailure(detail, field="quantization.fisher", hint=hint)
    return {name: Fisher(f.rows.cpu(), f.columns.cpu()) for name, f in sums.items()}


def sequences_at_once(model: StreamedModel, length: int) -> int:
    """Sequences whose hidden states before all blocks fit on the host; at least one."""
    each = (len(model.blocks) + 1) * length * model.width * model.dtype.itemsize
    return max(1, int(FISHER_SHARE * host_memory() / each))


def _store(model: StreamedModel, ids: Tensor) -> torch.device:
    """The device of hidden states: the model's, if they take a small part of its memory."""
    size = (len(model.blocks) + 1) * ids.numel() * model.width * model.dtype.itemsize
    fits = size <= FISHER_SHARE * device_memory(model.device)
    return model.device if fits else torch.device("cpu")


@torch.no_grad()
def _forward(model: StreamedModel, calls: tuple[BlockCall, ...], ids: Tensor, micro_batch: int) -> list[Tensor]:
    """Hidden states before each block and after the last, each (sequences, length, width), where they are kept."""
    store = _store(model, ids)
    with model.loaded(*model.layout.outer):
        states = [torch.cat([model.embed(row[None].to(model.device)).to(store) for row in ids])]
    for index, block in enumerate(model.blocks):
        states.append(torch.empty_like(states[-1]))
        with model.loaded(model.layout.block(index)):
            run_block(calls[index], block, states[-2], states[-1], micro_batch=micro_batch, device=model.device)
    if not states[-1].isfinite().all():
        raise original_overflows(model.dtype)
    return states


def _head_of(model: StreamedModel, names: Collection[str]) -> str | None:
    """The name under which the head is wanted; None if it is not."""
    name = model.layout.embeddings if model.tied else model.layout.head
    return name if name in names else None


def _loss_gradient(
    model: StreamedModel, hidden: Tensor, ids: Tensor, head: str | None, sums: dict[str, Fisher]
) -> Tensor:
    """dL/d(hidden states after the last block), the shape of `hidden`, which it replaces.

    head   where the squared gradients by the head's weight are added in `sums`; None: nowhere
    """
    step = max(1, LOGITS_AT_ONCE[model.device.type] // model.vocabulary)
    with model.loaded(*model.after_blocks):
        weight = model.model.get_submodule(model.layout.head).get_parameter("weight").requires_grad_(head is not None)
        for states, tokens in zip(hidden, ids, strict=True):
            by_head = None if head is None else torch.zeros(weight.shape, device=model.device)
            for start in range(0, len(tokens), step):
                labels = tokens[start + 1 : start + 1 + step].to(model.device)
                leaf = states[start : start + step].to(model.device).requires_grad_()
                with torch.enable_grad():
                    logits = model.logits(leaf[None])[0, : len(labels)]
                    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                inputs = [leaf] if by_head is None else [leaf, weight]
                gradient, *others = torch.autograd.grad(loss, inputs)
                states[start : start + step] = gradient.to(states)
                if by_head is not None:
                    by_head += others[0]
            if head is not None and by_head is not None:
                _add(sums, head, by_head)
    return hidden


def _embeddings_backward(model: StreamedModel, ids: Tensor, gradient: Tensor, sums: dict[str, Fisher]) -> None:
    """Adds the embeddings' squared gradients to `sums`, from those by the inputs of block 0.

    Of a matrix that is the head, too, the squares of both uses are added: their product is left out, which is small,
    for few rows are looked up in a sequence, and a row that is has its gradient as the head from other tokens.
    """
    with model.loaded(*model.layout.outer):
        weight = model.model.get_submodule(model.layout.embeddings).get_parameter("weight").requires_grad_()
        for tokens, outer in zip(ids, gradient, strict=True):
            with torch.enable_grad():
                hidden = model.embedded(tokens[None].to(model.device))
            (by_weight,) = torch.autograd.grad(hidden, weight, outer[None].to(hidden))
            _add(sums, model.layout.embeddings, by_weight)


def _add(sums: dict[str, Fisher], name: str, gradient: Tensor) -> None:
    """Adds a sequence's squared gradient by a weight (out, in), or those of several (sequences, out, in)."""
    squares = gradient.float().square().view(-1, *gradient.shape[-2:])
    added, known = Fisher(squares.sum((0, 2)), squares.sum((0, 1))), sums.get(name)
    sums[name] = added if known is None else Fisher(known.rows + added.rows, known.columns + added.columns)


def _backward(
    model: StreamedModel,
    call: BlockCall,
    index: int,
    wanted: list[str],
    inputs: Tensor,
    gradient: Tensor,
    sums: dict[str, Fisher],
    micro_batch: int,
) -> None:
    """Adds a block's squared gradients to `sums`; `gradient` by its outputs becomes that by its inputs."""
    block, prefix = model.blocks[index], model.layout.block(index)
    with model.loaded(prefix):
        linears = {f"{prefix}.{name}": model.block_linears(index)[name] for name in wanted}
        largest = max((linear.weight.numel() for linear in linears.values()), default=1)
        at_once = max(1, min(micro_batch, SQUARES_AT_ONCE[model.device.type] // largest))
        first = 0
        while first < len(inputs):
            rows = slice(first, first + at_once)
            hidden, outer = inputs[rows].to(model.device), gradient[rows]
            together = _together(partial(call, block), linears, hidden, outer, sums) if len(hidden) > 1 else None
            if together is None and len(hidden) > 1:
                at_once = 1
                continue
            by_inputs = _alone(partial(call, block), linears, hidden, outer, sums) if together is None else together
            outer.copy_(by_inputs)
            first += len(hidden)


def _together(
    forward: Callable[[Tensor], Tensor],
    linears: Mapping[str, nn.Linear],
    hidden: Tensor,
    outer: Tensor,
    sums: dict[str, Fisher],
) -> Tensor | None:
    """The gradient by inputs (sequences, length, width); squares go to `sums`.

    None, and nothing is added, where some linear does not see each sequence by itself.
    """
    leaf = hidden.requires_grad_()
    with torch.enable_grad(), _calls_of(linears) as calls:
        output = forward(leaf)
    apart = all(x.dim() == 3 and x.shape[:2] == hidden.shape[:2] for each in calls.values() for x, _ in each)
    if not apart or not all(calls.values()):
        return None
    outputs = [y for each in calls.values() for _, y in each]
    by_inputs, *gradients = torch.autograd.grad(
        output, [leaf, *outputs], outer.to(output), allow_unused=True, materialize_grads=True
    )
    by_output = iter(gradients)
    for name, each in calls.items():
        products = [next(by_output).mT @ x for x, _ in each]
        _add(sums, name, torch.stack(products).sum(0) if len(products) > 1 else products[0])
    found: Tensor = by_inputs
    return found


@contextmanager
def _calls_of(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inputs and outputs of the linears' calls while the context lasts, by name."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}

    def noted(name: str, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name].append((given[0].detach(), output))

    hooks = [linear.register_forward_hook(partial(noted, name)) for name, linear in linears.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _alone(
    forward: Callable[[Tensor], Tensor],
    linears: Mapping[str, nn.Linear],
    hidden: Tensor,
    outer: Tensor,
    sums: dict[str, Fisher],
) -> Tensor:
    """The gradient by the inputs of one sequence, (1, length, width); squares go to `sums`."""
    leaf, weights = hidden.requires_grad_(), [linear.weight.requires_grad_() for linear in linears.values()]
    with torch.enable_grad():
        output = forward(leaf)
    # An expert that none of the sequence's tokens went through has a gradient of zeros.
    by_inputs, *gradients = torch.autograd.grad(
        output, [leaf, *weights], outer.to(output), allow_unused=True, materialize_grads=True
    )
    for name, each in zip(linears, gradients, strict=True):
        _add(sums, name, each)
    found: Tensor = by_inputs
    return found
