"""Tokens that a block's experts got in the calibration pass, and what happens to those that got few.

    floor = max(256, 2 G), at most a quarter of an even share of all tokens        G: the experts' largest group

An expert below the floor is starved. Routing stays true: what it computes for the block's output is of its own tokens
alone. But its linears are called on every token of the block's sequences while a method observes it, so that second
moments, Hessians and magnitudes are of many tokens; and where weights are tuned by the block's output, its own stay at
their start, which those moments chose. It is named in the report and in a warning.

The cap lets a floor mean something for a small calibration too: an expert with a quarter of an even share is not the
one that lacks data, the calibration is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from bitwright.report import BlockReport, ExpertsReport
from workers.contracts.blocks import BlockForward
from workers.contracts.experts import experts_of, place_of
from workers.engine.device.process_group import ProcessGroup
from workers.engine.quantize.activations import second_moments, sum_moments

FEWEST, GROUPS, SHARE, BORROWED = 256, 2, 4, 4
"""Tokens that an expert needs; groups that it needs tokens for; the even share's part that is enough; and floors of
tokens that a starved expert's second moments are taken from."""
FALLBACK = "called on every token of the block's sequences while it is observed; its weights stay at their start"
NAMED = 4
"""Experts that a warning names."""


@dataclass(frozen=True)
class Coverage:
    """Tokens of a block's experts: part of the block -> by expert. `floors` by part."""

    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)

    @property
    def starved(self) -> dict[str, frozenset[int]]:
        """Experts below the floor, by part; parts without one are absent."""
        few = {
            part: frozenset(expert for expert, count in enumerate(counts) if count < self.floors[part])
            for part, counts in self.tokens.items()
        }
        return {part: experts for part, experts in few.items() if experts}

    def linears(self, block: nn.Module, names: Sequence[str]) -> frozenset[str]:
        """Those of some linears of the block that belong to a starved expert."""
        starved, places = self.starved, {name: place_of(block, name) for name in names}
        return frozenset(
            n for n, place in places.items() if place is not None and place[1] in starved.get(place[0], ())
        )

    def report(self, block: str) -> tuple[ExpertsReport, ...]:
        """One for each part, under its full name."""
        return tuple(
            ExpertsReport(
                name=f"{block}.{part}",
                experts=len(counts),
                tokens_least=min(counts),
                tokens_median=median(counts),
                floor=self.floors[part],
                starved={f"{block}.{part}.{expert}": counts[expert] for expert in sorted(self.starved.get(part, ()))},
                fallback=FALLBACK if part in self.starved else None,
            )
            for part, counts in self.tokens.items()
        )


@contextmanager
def counted(block: nn.Module, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Tokens of each expert of the block in the calls while the context lasts, int64 (experts,), by part."""
    parts = experts_of(block)
    counts = {name: torch.zeros(part.number, dtype=torch.int64, device=device) for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.seen = counts[name]
        yield counts
    finally:
        for part in parts.values():
            part.seen = None


def coverage(counts: Mapping[str, Tensor], schemes: Mapping[str, Scheme], block: nn.Module) -> Coverage:
    """From the tokens of all processes' sequences; waits for the device once where there are experts."""
    tokens = {part: count.tolist() for part, count in counts.items()}
    floors = {}
    for part, each in tokens.items():
        widths = [
            scheme.width(block.get_submodule(name).get_parameter("weight").shape[1])
            for name, scheme in schemes.items()
            if name.startswith(f"{part}.")
        ]
        wanted = max(FEWEST, GROUPS * max(widths, default=0))
        floors[part] = min(wanted, math.ceil(sum(each) / len(each) / SHARE))
    return Coverage(tokens, floors)


@contextmanager
def complete(block: nn.Module, starved: Mapping[str, frozenset[int]]) -> Iterator[None]:
    """While the context lasts, the linears of these experts, by part, are called on every token."""
    parts = experts_of(block)
    with ExitStack() as stack:
        for name, experts in starved.items():
            before = parts[name].complete
            parts[name].complete = experts
            stack.callback(partial(setattr, parts[name], "complete", before))
        yield


@torch.no_grad()
def borrowed_moments(
    block: nn.Module,
    forward: BlockForward,
    inputs: Tensor,
    found: Coverage,
    names: Sequence[str],
    *,
    device: torch.device,
    processes: ProcessGroup,
) -> dict[str, Tensor]:
    """Second moments of starved experts' inputs where they are called on every token of some sequences.

    inputs   hidden states before the block (sequences, length, width)
    names    the starved experts' linears
    """
    linears = {
        name: module for name, module in block.named_modules() if name in names and isinstance(module, nn.Linear)
    }
    tokens = BORROWED * max(FEWEST, *found.floors.values())
    rows = inputs[: math.ceil(tokens / inputs.shape[1])] if len(inputs) else inputs
    with complete(block, found.starved), second_moments(linears) as moments:
        for row in torch.split(rows, 1):
            forward(block, row.to(device))
        sum_moments(processes, moments, linears)
    return moments


def starved_warning(blocks: Sequence[BlockReport]) -> str | None:
    """A warning that names experts that got too few tokens; None where none did."""
    starved = {n: count for block in blocks for part in block.experts for n, count in part.starved.items()}
    if not starved:
        return None
    first = [f"{name} ({count} tokens)" for name, count in list(starved.items())[:NAMED]]
    more = f" and {len(starved) - NAMED} more, in the report" if len(starved) > NAMED else ""
    return (
        f"{len(starved)} experts got too few tokens of the calibration text and were {FALLBACK}: {', '.join(first)}"
        f"{more}; more or other text may reach them"
    )
