"""Training's passes through the blocks as CUDA graphs: thousands of small kernels with one launch.

    hidden = blocks(batch)            a graph
    L, dL/dhidden                     eager: how many tokens are learned differs from batch to batch
    adapters' gradients += ...        a graph

A pair of graphs serves batches of one shape, and reads them where the first one lay. What a pass needs lives in one
pool, which the pairs share, since a pair has finished before another begins. A shape that comes but a few times is not
worth a pair; nor is a model whose activations take much of the device (`workers.engine.finetune.memory_plan`), which
is not bound by launches either. Adapters that hold some of their parameters from a step on begin with new pairs.

Blocks whose activations are computed again are so within the backward pass's graph: of the forward one's tensors only
their inputs stay, and the second forward pass of a block takes the memory that the first one left. Weights that are
made anew are made in each of the two. Recomputed dropout would have to set back the generator, which a graph cannot:
then passes stay eager.

Random numbers are those of eager passes: a replay goes on from the generator's seed and offset.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.device.cuda_graphs import capturing, warm_up
from workers.engine.finetune.resident_model import ResidentModel
from workers.engine.finetune.token_loss import token_loss
from workers.engine.text.packing import Batch

EAGER_FIRST = 2
"""Batches of a shape that are met before it is captured."""
MOST_SHAPES = 4
"""Pairs of graphs at most."""

Shape = tuple[int | bool, ...]
"""Rows and tokens of a batch, and whether each row is one example."""
Pass = Callable[[Batch, int], Tensor]
"""Adds to the adapters' gradients those of a batch's summed loss by a number of targets; its loss by them, ()."""


class Passes:
    """Finds the pass for a batch: a captured one where there is one, or will be from now on, else the eager one.

    log        called with an event's name and fields where a shape cannot be captured; then none is, from there on
    captures   whether any may be, which a plan allows on a GPU alone
    """

    def __init__(self, resident: ResidentModel, log: Callable[..., None], *, captures: bool) -> None:
        self._resident, self._log = resident, log
        self._captures = captures and resident.is_capturable
        self._trained: list[nn.Parameter] = []
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _Graphs] = {}

    def of(self, batch: Batch) -> Pass:
        """The pass for a batch. It may try passes on the way, which draws random numbers.

        Raises:
            RuntimeError: deterministic kernels are asked for, and one operator has none.
        """
        if not self._captures:
            return self._eager
        trained = _trained(self._resident.adapters.values())
        if len(trained) != len(self._trained):
            self._trained = trained
            self._forget()
        shape = (*batch.ids.shape, batch.documents is None)
        self._seen[shape] += 1
        if shape not in self._graphs and len(self._graphs) < MOST_SHAPES and self._seen[shape] > EAGER_FIRST:
            self._capture(shape, batch)
        graphs = self._graphs.get(shape)
        return self._eager if graphs is None else graphs.run

    def _eager(self, batch: Batch, targets: int) -> Tensor:
        with self._resident.together():
            loss = self._resident.loss(batch) / targets
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _forget(self) -> None:
        self._seen.clear()
        self._graphs.clear()

    def _capture(self, shape: Shape, batch: Batch) -> None:
        pool = next((graphs.forward.pool() for graphs in self._graphs.values()), None)
        try:
            self._graphs[shape] = _Graphs.of(self._resident, batch, self._trained, pool)
        except RuntimeError as error:  # out of memory, too: an eager pass may still fit
            if "deterministic" in str(error):
                raise
            self._captures = False
            self._forget()
            self._log("training_capture_failed", reason=str(error)[:200])
        if not self._captures:
            # Frames of the failure hold its autograd graph, whose nodes belong to the capture's stream, and which
            # an eager pass would use again.
            gc.collect()
        torch.cuda.empty_cache()  # of what the passes that were tried took


@dataclass(frozen=True)
class _Graphs:
    """Both passes for batches of one shape.

    batch       what the forward pass reads: ids, positions and documents
    hidden      hidden states after the last block, (rows, length, width)
    by_hidden   the loss's gradient by them, which the backward pass reads
    """

    resident: ResidentModel
    batch: Batch
    hidden: Tensor
    by_hidden: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph

    @classmethod
    def of(cls, resident: ResidentModel, batch: Batch, trained: list[nn.Parameter], pool: Any) -> "_Graphs":
        """Captures them for batches like this one, in the memory pool of other graphs or (None) in one of their own.

        Raises:
            RuntimeError: something in a pass cannot be captured, or memory has run out.
        """
        own = Batch(
            batch.ids.clone(),
            batch.positions.clone(),
            None if batch.documents is None else batch.documents.clone(),
            batch.target_positions,
            batch.labels,
            batch.tokens,
        )

        def both() -> None:
            with resident.together():  # also around the backward pass, in which blocks may be computed again
                hidden = resident.hidden(own)
                torch.autograd.grad(hidden, trained, torch.zeros_like(hidden), allow_unused=True)

        warm_up(both)
        torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with ExitStack() as drawn:
            with capturing(forward, pool):
                drawn.enter_context(resident.together())
                hidden = resident.hidden(own)
            by_hidden = torch.zeros_like(hidden)
            with capturing(backward, forward.pool()):
                _add(trained, torch.autograd.grad(hidden, trained, by_hidden, allow_unused=True))
        return cls(resident, own, hidden.detach(), by_hidden, forward, backward)

    def run(self, batch: Batch, targets: int) -> Tensor:
        for captured, other in ((self.batch.ids, batch.ids), (self.batch.positions, batch.positions)):
            captured.copy_(other)
        if self.batch.documents is not None and batch.documents is not None:
            self.batch.documents.copy_(batch.documents)
        self.forward.replay()
        hidden = self.hidden.detach().requires_grad_()
        loss = token_loss(self.resident.model, hidden, batch.target_positions, batch.labels) / targets
        (by_hidden,) = torch.autograd.grad(loss, hidden)
        self.by_hidden.copy_(by_hidden)
        self.backward.replay()
        return loss.detach()


def _trained(adapters: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for p in chain.from_iterable(adapter.parameters() for adapter in adapters) if p.requires_grad]


@torch.no_grad()
def _add(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    """To the gradients that the parameters have, where they lie."""
    pairs = [(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if p.grad is not None and g is not None]
    torch._foreach_add_([sums for sums, _ in pairs], [added for _, added in pairs])
