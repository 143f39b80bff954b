"""Quality of everything that a job ships, each measured with its stored numbers, and what is said where they differ."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from app.domain.report import Figures, Quality, ShippedFigures
from workers.engine.shipped import Numbers, Replay, Shipment
from workers.engine.streams import Stream

NOTABLE = 0.005
"""Relative difference of perplexities of which the report warns."""
AS_TRAINED = Shipment((), Numbers.BESIDE)
"""The adapter beside the quantized weights, where it is merged and this is not shipped."""


@dataclass(frozen=True)
class Evaluated:
    """What the report tells: see its fields of these names, and `AdapterReport`."""

    quality: Quality
    shipped: tuple[ShippedFigures, ...]
    before_merge: Figures | None = None


@dataclass(frozen=True)
class Judge:
    """Measures a stream.

    head      dequantized weight of the head, where that is quantized, as the finished blocks have it
    measure   quality of the stream as it is with a weight of the head; also told which measurement it is, of how many
    """

    head: Tensor | None
    measure: Callable[[Tensor | None, int, int], Quality]


def evaluate(
    ways: Sequence[Shipment],
    replay: Replay,
    stream: Stream,
    judge: Judge,
    *,
    merged: bool,
    streamed: tuple[Numbers, bool] | None,
) -> Evaluated:
    """Measures every one of `ways`, the first of which is what was asked for.

    merged     whether an adapter is folded in or added, so that how it was trained is measured besides
    streamed   key of what the stream has gone through already; None: it must go through the blocks again for all

    Raises:
        NumericalFailure: the original or the quantized model's output is not finite.
    """
    needed = {way.key: way for way in (*ways, *([AS_TRAINED] if merged else []))}
    found: dict[tuple[Numbers, bool], Quality] = {}
    for number, key in enumerate(sorted(needed, key=lambda key: key != streamed)):
        if key != streamed:
            replay.run(stream, needed[key])
        head = replay.head(needed[key]) if needed[key].in_gguf else judge.head
        found[key] = judge.measure(head, number, len(needed))
    return Evaluated(
        quality=found[ways[0].key],
        shipped=tuple(
            ShippedFigures(
                checkpoints=way.checkpoints, adapter=way.adapter, whole=way.is_whole, figures=Figures.of(found[way.key])
            )
            for way in ways
        ),
        before_merge=Figures.of(found[AS_TRAINED.key]) if merged else None,
    )


def differences(found: Evaluated, how: str) -> Iterator[tuple[str, str]]:
    """Code and message of each warning; `how` says what a merge does."""
    told = found.quality.perplexity
    if found.before_merge is not None and _is_notable(found.before_merge.perplexity, told):
        before = found.before_merge.perplexity
        yield (
            "merge_changed_the_result",
            f"{how} changes the result: perplexity {told:.4g} as it ships, {before:.4g} with the adapter beside the "
            "quantized weights, as it was trained; the report's quality is of what ships",
        )
    for way in found.shipped:
        if way.whole and _is_notable(way.figures.perplexity, told):
            first = found.shipped[0]
            yield (
                "formats_differ",
                f"{_named(way)} gives perplexity {way.figures.perplexity:.4g}, {_named(first)} {told:.4g}: they do not "
                "round alike; the report's quality is of the latter",
            )


def _is_notable(one: float, other: float) -> bool:
    return abs(one - other) > NOTABLE * min(one, other)


def _named(way: ShippedFigures) -> str:
    names = " or ".join(way.checkpoints)
    return names if way.adapter is None else f"{names} with {way.adapter}"
