"""Facts about a model that only a call shows, found once at opening, without weights: its way through its blocks.

The decoder runs with stand-ins for its blocks and numbers in place of its few other weights. It must call every block
once, in order, and hand on what the block before returned; what it passes besides may depend on the length and the
number of sequences, but not on the tokens. A model that does more is refused by the argument's name.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitwright.errors import UnsupportedArchitecture
from workers.engine.model.block_calls import BlockCall, plain_value
from workers.engine.model.layouts import HINT, Layout
from workers.engine.model.special_cases import SHARED_STATES
from workers.engine.model.stand_ins import StandIn, imitated, stand_ins

LENGTH = 8
"""Tokens of a dry run."""
LONGEST_TUPLE = 4
"""Outputs that a block may return."""


@dataclass(frozen=True)
class Walk:
    """The way of a model through its blocks.

    outputs      length of the tuple that a block returns; 0 for a tensor alone
    by_row       arguments that a batch needs repeated (`BlockCall.by_row`)
    embeds       whether the embedding matrix's rows are block 0's input as they are
    norm         the one module of the decoder after its last block; None if it does more, or nothing
    plain        whether the decoder does nothing but `norm` after its last block
    width        of hidden states
    """

    outputs: int
    by_row: frozenset[str]
    embeds: bool
    norm: str | None
    plain: bool
    width: int


@torch.no_grad()
def walk_of(model: PreTrainedModel, layout: Layout, device: torch.device) -> Walk:
    """The way of this model, which has its buffers but no weights, through its blocks.

    Raises:
        UnsupportedArchitecture: it cannot be followed block by block.
    """
    vocabulary = model.get_submodule(layout.embeddings).weight.shape[0]
    ids = (torch.arange(2 * LENGTH, device=device) % vocabulary).view(2, LENGTH)
    with imitated(model, layout.outer, device):
        outputs = _outputs(model, layout, ids)
        runs = [_run(model, layout, rows, outputs) for rows in (ids[:1], ids[1:], ids)]
        embedded = model.get_submodule(layout.embeddings)(ids[:1])
        _demand_alone(model, layout, ids, outputs)
    first = runs[0]
    hidden = first.recorders[0].received
    if hidden is None or hidden.dim() != 3:
        shape = None if hidden is None else tuple(hidden.shape)
        raise _refused(model, f"hidden states are of shape {shape}, not (sequences, length, width)")
    by_row: set[str] = set()
    for calls in zip(*([recorder.calls[0] for recorder in run.recorders] for run in runs), strict=True):
        by_row |= set(_by_row(model, *calls))
    return Walk(
        outputs=outputs,
        by_row=frozenset(by_row),
        embeds=torch.equal(hidden, embedded) if hidden.shape == embedded.shape else False,
        norm=first.norm,
        plain=first.plain,
        width=hidden.shape[-1],
    )


@dataclass(frozen=True)
class _Run:
    recorders: list[StandIn]
    norm: str | None
    plain: bool


def _run(model: PreTrainedModel, layout: Layout, ids: Tensor, outputs: int) -> _Run:
    decoder = model.get_submodule(layout.decoder)
    with stand_ins(model, layout.blocks, outputs) as recorders, _watched(model, layout) as seen:
        states = decoder(input_ids=ids, use_cache=False)[0]
    last = recorders[-1].passed
    norms = [name for name, given, made in seen if _same(given, last) and _same(made, states)]
    plain = _same(states, last) or bool(norms)
    return _Run(recorders, norms[0] if norms else None, plain)


class _Beside:
    """Outputs of a block besides hidden states."""


def _demand_alone(model: PreTrainedModel, layout: Layout, ids: Tensor, outputs: int) -> None:
    """Check that no block is given what another one returned besides hidden states.

    Raises:
        UnsupportedArchitecture: one is.
    """
    if outputs < 2:
        return
    with stand_ins(model, layout.blocks, outputs) as recorders:
        for recorder in recorders:
            recorder.beside = _Beside()
        try:
            model.get_submodule(layout.decoder)(input_ids=ids, use_cache=False)
        except (ValueError, IndexError, TypeError, AttributeError, RuntimeError):
            raise _refused(model, "it uses what a block returns besides hidden states") from None
    for recorder in recorders:
        for path, value in recorder.calls[0].leaves():
            if isinstance(value, _Beside):
                raise _refused(model, f"{path} is what the block before returned besides hidden states")


def _outputs(model: PreTrainedModel, layout: Layout, ids: Tensor) -> int:
    """The number of outputs with which the model hands on hidden states from block to block."""
    reason = ""
    for outputs in range(LONGEST_TUPLE + 1):
        try:
            run = _run(model, layout, ids, outputs)
        except (ValueError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            reason = reason or " ".join(str(error).split())[:200]
            continue
        calls = [len(recorder.calls) for recorder in run.recorders]
        pairs = zip(run.recorders[1:], run.recorders, strict=False)
        handed_on = all(later.received is earlier.passed for later, earlier in pairs)
        if set(calls) == {1} and handed_on and isinstance(run.recorders[-1].received, Tensor):
            return outputs
        reason = reason or f"blocks are called {calls} times, or get other hidden states than the block before made"
    raise _refused(model, reason)


@contextmanager
def _watched(model: PreTrainedModel, layout: Layout) -> Iterator[list[tuple[str, Any, Any]]]:
    """Name, input and output of each call of the decoder's other modules."""
    seen: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, given, made: seen.append((name, given[0] if given else None, made))

    with ExitStack() as stack:
        for name, module in model.get_submodule(layout.decoder).named_children():
            path = f"{layout.decoder}.{name}"
            if not layout.blocks.startswith(path):
                stack.callback(module.register_forward_hook(note(path)).remove)
        yield seen


def _same(one: object, other: object) -> bool:
    """True for the same numbers in the same memory, however they are viewed."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _by_row(model: PreTrainedModel, one: BlockCall, other: BlockCall, both: BlockCall) -> Iterator[str]:
    """Arguments that grow with the number of sequences.

    one, other   calls of one block with a sequence each; `both` with the two together
    """
    others, joined = dict(other.leaves()), dict(both.leaves())
    for path, value in one.leaves():
        if not plain_value(value) and not _is_empty(model, path):
            raise _refused(model, f"block calls share {path}, a {type(value).__name__}")
        if not isinstance(value, Tensor):
            continue
        again, of_both = others.get(path), joined.get(path)
        if not isinstance(again, Tensor) or again.shape != value.shape or not torch.equal(value, again):
            raise _refused(model, f"{path}, an argument of its blocks, depends on the tokens")
        if not isinstance(of_both, Tensor):
            raise _refused(model, f"{path}, an argument of its blocks, is not always there")
        rows = value.shape[0] if value.dim() else 1
        if value.dim() and of_both.shape[0] == 2 * rows and rows > 1:
            yield path


def _is_empty(model: PreTrainedModel, path: str) -> bool:
    """True for a container that blocks of this model share but never fill."""
    number = SHARED_STATES.get(path)
    return number is not None and not getattr(model.config.get_text_config(), number, None)


def _refused(model: PreTrainedModel, reason: str) -> UnsupportedArchitecture:
    model_type = model.config.model_type
    detail = f"transformers' {model_type} cannot be followed block by block: {reason}"
    return UnsupportedArchitecture(detail, field="model", value=model_type, hint=HINT)
