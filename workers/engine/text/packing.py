"""Examples packed into sequences of one length, and the batches that training steps read.

Several examples share a sequence without seeing each other: positions begin anew with each, and attention stays within
(`workers.engine.finetune.resident_model` makes the masks). So packing changes what a step costs, not what it computes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.text.examples import Example

LENGTH_STEP = 8
"""Batches are as long as their longest sequence, rounded up to this."""


@dataclass(frozen=True)
class PackedSequences:
    """All sequences of a text, on the host; the tail of each is padding.

    ids        int32 (sequences, length)
    documents  int32, which example of its sequence a token belongs to, from 0; -1 for padding
    targets    bool, whether the token after this one is learned from here
    """

    ids: Tensor
    documents: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.documents >= 0).sum(-1).max())

    @property
    def tokens(self) -> int:
        """Of all sequences, without padding."""
        return int((self.documents >= 0).sum())

    @classmethod
    def pack(cls, examples: Sequence[Example], length: int, *, together: bool) -> "PackedSequences":
        """Sequences of at most `length` tokens; one example in each unless they are packed `together`."""
        lengths = [len(example.ids) for example in examples]
        rows = _places(lengths, length) if together else [[index] for index in range(len(examples))]
        shape = (len(rows), length)
        ids, documents = torch.zeros(shape, dtype=torch.int32), torch.full(shape, -1, dtype=torch.int32)
        targets = torch.zeros(shape, dtype=torch.bool)
        for row, members in enumerate(rows):
            first = 0
            for number, member in enumerate(members):
                example = examples[member]
                place = slice(first, first := first + len(example.ids))
                ids[row, place], documents[row, place] = example.ids, number
                targets[row, place.start : place.stop - 1] = example.loss_mask[1:]
        return cls(ids, documents, targets)


def _places(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Assignment of examples to sequences: the longest first, each where it leaves the least room (best fit)."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # room left and row, ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            left, row = limit, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


@dataclass(frozen=True)
class Batch:
    """Some sequences as the model reads them.

    ids        int64 (rows, length)
    positions  int64 (rows, length), from 0 in each example
    documents  int32 (rows, length); None where each row is one example, so that causal attention is enough
    target_positions     int64 (targets,): in ids, flat, from where the next token is learned
    labels  int64 (targets,): that token
    tokens     read, without padding
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor | None
    target_positions: Tensor
    labels: Tensor
    tokens: int

    def to(self, device: torch.device) -> "Batch":
        """On the device; from pinned memory the copies are not waited for."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        documents = None if self.documents is None else move(self.documents)
        moved = (move(t) for t in (self.ids, self.positions, self.target_positions, self.labels))
        ids, positions, target_positions, labels = moved
        return Batch(ids, positions, documents, target_positions, labels, self.tokens)


def batch_of(sequences: PackedSequences, rows: Tensor) -> Batch:
    """The sequences of these numbers, int64 (rows,), as short as they can be."""
    documents = sequences.documents[rows]
    longest = int((documents >= 0).sum(-1).max())
    length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, documents.shape[1])
    documents, ids = documents[:, :length], sequences.ids[rows, :length].long()
    target_positions = sequences.targets[rows, :length].flatten().nonzero()[:, 0]
    packed = bool((documents > 0).any())
    return Batch(
        ids=ids,
        positions=_positions(documents),
        documents=documents.contiguous() if packed else None,
        target_positions=target_positions,
        labels=ids.flatten()[target_positions + 1],
        tokens=int((documents >= 0).sum()),
    )


def _positions(documents: Tensor) -> Tensor:
    """The distance of each token from the first one of its example."""
    index = torch.arange(documents.shape[1]).expand(documents.shape)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
    return index - begins.cummax(-1).values


@dataclass(frozen=True)
class Step:
    """Batches of one optimizer step: this process's micro-batches, and how many tokens all processes learn from."""

    batches: tuple[Batch, ...]
    targets: int
    tokens: int

    def to(self, device: torch.device) -> "Step":
        return Step(tuple(batch.to(device) for batch in self.batches), self.targets, self.tokens)


@dataclass(frozen=True)
class Order:
    """The order in which steps read sequences: all of them once per epoch, shuffled anew by the seed for each."""

    sequences: PackedSequences
    batch_size: int
    micro_batch: int
    seed: int
    processes: ProcessGroup = SINGLE_PROCESS

    def rows(self, step: int) -> Tensor:
        """The sequences of a step, over all ranks, int64 (batch_size,)."""
        count = len(self.sequences)
        first = step * self.batch_size
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        offset = first - epochs.start * count
        return torch.cat([self._epoch(epoch) for epoch in epochs])[offset : offset + self.batch_size]

    def step(self, index: int) -> Step:
        """The batches of a step, on the host."""
        rows = self.rows(index)
        own = self.processes.share(rows)
        batches = tuple(batch_of(self.sequences, chunk) for chunk in torch.split(own, self.micro_batch) if len(chunk))
        targets = int(self.sequences.targets[rows].sum())
        return Step(batches, targets, int((self.sequences.documents[rows] >= 0).sum()))

    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
        return torch.randperm(len(self.sequences), generator=generator)
