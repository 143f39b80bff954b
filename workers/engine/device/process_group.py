"""The processes that compute one job together, as one of them sees it.

Every rank runs the whole pipeline, block by block, over its own share of the sequences: rank r of W takes the sequences
r, r + W, r + 2W and so on of each text. What a rank derives from sums over sequences it derives from the sums over all
ranks, which are the same bits on each of them, so every rank takes the same steps and makes the same codes, and
nothing but sums is exchanged: the gradient once per step, a few numbers per block. Rank 0 writes the files and reports.

Numbers on a GPU go through NCCL, those on the host through gloo; the ranks find each other by a file in the workspace.
A rank that is lost breaks the exchange of the others; the supervisor ends what is left.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)
"""Time that a rank waits for another: at the start, for one that reads the text more slowly or waits for the lock."""


@dataclass(frozen=True)
class ProcessGroup:
    """`size` processes, of which this is number `rank`. A world of one exchanges nothing."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True if this is the process that writes files and reports."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows of a tensor that all ranks hold: every `size`-th, so that shares differ by one at most."""
        return rows[self.rank :: self.size]

    def share_size(self, count: int) -> int:
        """Sequences per rank of `count` in all, the same for every rank; at least 1."""
        return max(1, count // self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Each tensor becomes its sum over all ranks, in place; on a GPU in the order of its stream, unawaited."""
        if not self.alone:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def total(self, number: int) -> int:
        """The sum of every rank's number."""
        total = torch.tensor(number)
        self.sum_(total)
        return int(total)

    def least(self, number: int) -> int:
        """The lowest of every rank's number."""
        lowest = torch.tensor(number)
        if not self.alone:
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return int(lowest)

    def agree(self, number: int) -> bool:
        """True if every rank has this number."""
        return self.least(number) == -self.least(-number)

    def wait(self) -> None:
        """Returns once every rank is here."""
        self.total(0)


SINGLE_PROCESS = ProcessGroup()


def checksum(results: Iterable[object]) -> int:
    """The sum of all bytes of tensors in dataclasses: if any tensor is different, so is the sum, but for a chance."""
    return sum(int(t.flatten().view(torch.uint8).sum(dtype=torch.int64)) for r in results for t in _tensors(r))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


@contextmanager
def joined(processes: ProcessGroup, rendezvous: str, device: torch.device) -> Iterator[ProcessGroup]:
    """The ranks while they can reach each other; waits until all are there. `rendezvous` is the path of a new file.

    Raises:
        RuntimeError: a rank is missing, or lost later on.
    """
    if processes.alone:
        yield processes
        return
    store = dist.FileStore(rendezvous, processes.size)  # type: ignore[attr-defined]
    by = backend(device, processes.size)
    dist.init_process_group(by, store=store, rank=processes.rank, world_size=processes.size, timeout=PATIENCE)
    yield processes
    # Not after an error: a group that has lost a member may wait for it, and the process is about to end.
    dist.destroy_process_group()


def backend(device: torch.device, size: int) -> str:
    """Backend of the sums. NCCL wants a GPU per process; where processes share one, for a test, gloo does without."""
    if device.type != "cuda" or torch.cuda.device_count() < size:
        return "gloo"
    return "cpu:gloo,cuda:nccl"
