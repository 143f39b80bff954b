"""Quality of everything that a job ships, each measured with its stored numbers, and what is said where they differ."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from bitwright.errors import NumericalFailure
from bitwright.measured.tasks import TaskReport
from bitwright.report import Figures, FinetuningReport, Quality, ShippedFigures
from workers.engine.quantize.activations import Activations
from workers.engine.shipped import Key, Numbers, Replay, Shipment

NOTABLE = 0.005
"""Relative difference of perplexities of which the report warns."""
AS_TRAINED = Shipment((), Numbers.BESIDE)
"""The adapter beside the quantized weights, where it is merged and this is not shipped."""


@dataclass(frozen=True)
class Evaluated:
    """Fields of these names in the report, and in `AdapterReport`; `reference` is its row of round to nearest."""

    quality: Quality
    shipped: tuple[ShippedFigures, ...]
    before_merge: Figures | None = None
    reference: Figures | None = None
    tasks: tuple[TaskReport, ...] = ()


@dataclass(frozen=True)
class QualityMeter:
    """Measures activations after the last block.

    head      dequantized weight of the head, where that is quantized, as the finished blocks have it
    measure   quality of the activations with a weight of the head, given the measurement's number and their count
    """

    head: Tensor | None
    measure: Callable[[Tensor | None, int, int], Quality]


def evaluate(
    shipments: Sequence[Shipment],
    replay: Replay,
    activations: Activations,
    meter: QualityMeter,
    *,
    merged: bool,
    streamed: Key | None,
) -> Evaluated:
    """Measures every one of `shipments`, the first of which is what was asked for.

    merged     whether an adapter is folded in or added, so that how it was trained is measured besides
    streamed   key of what the activations have gone through already; None: it must go through the blocks again for all

    Raises:
        NumericalFailure: the original or the quantized model's output is not finite.
    """
    needed = {shipment.key: shipment for shipment in (*shipments, *([AS_TRAINED] if merged else []))}
    results = {shipment.key for shipment in shipments if shipment.is_whole}
    qualities: dict[Key, Quality] = {}
    for number, key in enumerate(sorted(needed, key=lambda key: key != streamed)):
        if key != streamed:
            replay.run(activations, needed[key])
        head = replay.head(needed[key]) if needed[key].rounding is not None else meter.head
        try:
            qualities[key] = meter.measure(head, number, len(needed))
        except NumericalFailure:
            if key in results:
                raise  # what is only a part, or was only trained so, may be anything
    figures = {key: Figures.of(quality) for key, quality in qualities.items()}
    return Evaluated(
        quality=qualities[shipments[0].key],
        shipped=tuple(
            ShippedFigures(
                checkpoints=shipment.checkpoints,
                adapter=shipment.adapter,
                whole=shipment.is_whole,
                figures=figures[shipment.key],
            )
            for shipment in shipments
            if shipment.key in figures
        ),
        before_merge=figures.get(AS_TRAINED.key) if merged else None,
    )


def differences(evaluated: Evaluated, training: FinetuningReport | None, merging: str) -> Iterator[tuple[str, str]]:
    """Code and message of each warning, with both figures; `merging` says what a merge does."""
    perplexity, before = evaluated.quality.perplexity, evaluated.before_merge
    notable = before is not None and _is_notable(before.perplexity, perplexity)
    losses = _changed_losses(training)
    if before is not None and (notable or losses):
        yield (
            "merge_changed_the_result",
            f"{merging} changes the result: perplexity {perplexity:.4g} as it ships, {before.perplexity:.4g} with the "
            f"adapter beside the quantized weights, as it was trained{losses}; `quality` is of what ships",
        )
    for way in evaluated.shipped:
        if way.whole and _is_notable(way.figures.perplexity, perplexity):
            yield (
                "formats_differ",
                f"{_named(way)} gives perplexity {way.figures.perplexity:.4g}, {_named(evaluated.shipped[0])} "
                f"{perplexity:.4g}: they do not round alike; `quality` is of the latter",
            )


def _changed_losses(training: FinetuningReport | None) -> str:
    """Held-out losses of the text that was learned, where the weights that ship have another; else nothing."""
    if training is None or training.loss_shipped is None or training.loss_after is None:
        return ""
    if abs(training.loss_shipped - training.loss_after) <= NOTABLE:
        return ""
    return (
        f", and on held-out text of the dataset a loss of {training.loss_shipped:.4g} in place of "
        f"{training.loss_after:.4g}"
    )


def _is_notable(one: float, other: float) -> bool:
    return abs(one - other) > NOTABLE * min(one, other)


def _named(way: ShippedFigures) -> str:
    names = " or ".join(way.checkpoints)
    return names if way.adapter is None else f"{names} with {way.adapter}"
