"""Experts of a block that see only the tokens routed to them: what methods and the tuning loop know of them."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

ComputeExperts = Callable[[Tensor, Tensor], Tensor]
"""(rows sorted by expert (rows, in), how many of each expert (experts,) int64) -> (rows, out)."""


class RoutedExperts(nn.Module):
    """A part of a block whose children "0", "1", ... are experts, each of linears under the same names.

    number    of experts
    sides     names of an expert's linears that get its input; their outputs meet in an activation
    down      name of the linear that gets what comes out of it
    computes_all  whether every expert computes every token, with zeros for those that are not its own
    seen      where not None, int64 (experts,): tokens of every call are added, on the device
    complete  experts whose linears are called on every token; what they give is still of the routed ones alone
    joined    computes all experts at once, set by whoever holds their weights in one tensor
    """

    number: int
    sides: tuple[str, ...]
    down: str = "down_proj"
    computes_all: bool = False
    seen: Tensor | None = None
    complete: frozenset[int] = frozenset()
    joined: ComputeExperts | None = None

    @abstractmethod
    def activated(self, sides: Tensor) -> Tensor:
        """The input of `down`, (rows, in), from the outputs of `sides` next to each other, (rows, sum of out)."""

    @abstractmethod
    def finished(self, rows: Tensor) -> Tensor:
        """An expert's outputs from those of `down`."""

    def linear(self, expert: int, name: str) -> nn.Linear:
        """One linear of one expert."""
        module = self.get_submodule(f"{expert}.{name}")
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{expert}.{name} is {type(module).__name__}, not Linear")
        return module


def experts_of(block: nn.Module) -> dict[str, RoutedExperts]:
    """The parts of a block that route, by their names inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, RoutedExperts)}


def place_of(block: nn.Module, linear: str) -> tuple[str, int, str] | None:
    """(name of the part, number of the expert, name in it) of an expert's linear; None for any other."""
    for part, module in experts_of(block).items():
        expert, _, name = linear.removeprefix(f"{part}.").partition(".")
        if linear.startswith(f"{part}.") and expert.isdecimal() and name in (*module.sides, module.down):
            return part, int(expert), name
    return None


@contextmanager
def all_called(block: nn.Module) -> Iterator[None]:
    """While the context lasts, every expert's linears are called on every token, so that none is overlooked."""
    parts = experts_of(block).values()
    before = [part.complete for part in parts]
    for part in parts:
        part.complete = frozenset(range(part.number))
    try:
        yield
    finally:
        for part, complete in zip(parts, before, strict=True):
            part.complete = complete


def seen_together(block: nn.Module, groups: Sequence[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Groups of linears of one input in order, those together whose inputs do not depend on each other.

    Those are the sides of all experts of a part, and then all their `down`s: one pass shows the inputs of each.
    """
    stages: dict[object, list[tuple[str, ...]]] = {}
    for names in groups:
        place = place_of(block, names[0])
        key = names if place is None else (place[0], place[2] == experts_of(block)[place[0]].down)
        stages.setdefault(key, []).append(names)
    return list(stages.values())
