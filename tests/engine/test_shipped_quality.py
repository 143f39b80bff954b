"""Figures of a job's checkpoints: the order in which they are measured, and from which difference the report warns."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from bitwright.errors import NumericalFailure
from bitwright.report import Figures, Quality, ShippedFigures
from tests.reports import QUALITY
from workers.engine.shipped import Numbers, Shipment
from workers.engine.shipped_quality import Evaluated, QualityMeter, differences, evaluate

WHOLE = Shipment(("merged",), Numbers.WHOLE)
ALSO_WHOLE = Shipment(("native",), Numbers.WHOLE)
ROUNDED = Shipment(("gguf",), Numbers.WHOLE, None, ExportFormat.GGUF)
BASE = Shipment(("merged",), Numbers.BASE)


def figures(perplexity: float) -> Figures:
    return Figures(perplexity=perplexity, kl_divergence=0.1, top1_agreement=0.9)


def evaluated(whole: float, other: float, before: float | None = None) -> Evaluated:
    ways = [
        ShippedFigures(checkpoints=(name,), adapter=None, whole=True, figures=figures(value))
        for name, value in (("merged", whole), ("native", other))
    ]
    return Evaluated(
        QUALITY.model_copy(update={"perplexity": whole}), tuple(ways), None if before is None else figures(before)
    )


@pytest.mark.parametrize(("other", "told"), [(10.04, False), (9.96, False), (10.06, True), (9.94, True)])
def test_half_a_percent_of_the_smaller_perplexity_is_notable(other: float, told: bool) -> None:
    assert [code for code, _ in differences(evaluated(10.0, other), None, "merging")] == ["formats_differ"] * told
    found = differences(evaluated(10.0, 10.0, before=other), None, "merging")
    assert [code for code, _ in found] == ["merge_changed_the_result"] * told


@pytest.mark.parametrize(("shipped", "told"), [(2.004, False), (1.996, False), (2.006, True), (1.994, True)])
def test_half_a_hundredth_of_a_nat_of_held_out_loss_is_notable(shipped: float, told: bool) -> None:
    training: Any = SimpleNamespace(loss_shipped=shipped, loss_after=2.0)
    found = dict(differences(evaluated(10.0, 10.0, before=10.0), training, "merging"))
    assert list(found) == ["merge_changed_the_result"] * told
    assert not told or "a loss of" in found["merge_changed_the_result"]
    assert list(differences(evaluated(10.0, 10.0), training, "merging")) == []


class Replayed:
    """A replay and a meter, which keep in what order they were asked; perplexities by what was gone through last."""

    def __init__(self, found: dict[Any, float], streamed: Any) -> None:
        self.found, self.now = found, streamed
        self.asked: list[Any] = []
        self.heads: list[float] = []
        self.numbers: list[tuple[int, int]] = []

    def run(self, activations: Any, shipment: Shipment) -> None:
        self.now = shipment.key
        self.asked.append(self.now)

    def head(self, shipment: Shipment) -> Tensor:
        return torch.tensor(2.0)

    def measure(self, head: Tensor | None, number: int, count: int) -> Quality:
        self.heads.append(float(torch.tensor(0.0) if head is None else head))
        self.numbers.append((number, count))
        if self.found[self.now] < 0:
            raise NumericalFailure("not finite")
        return QUALITY.model_copy(update={"perplexity": self.found[self.now]})


def measured(shipments: list[Shipment], found: dict[Any, float], *, merged: bool, streamed: Any) -> tuple[Any, Any]:
    replay: Any = Replayed(found, streamed)
    meter = QualityMeter(torch.tensor(1.0), replay.measure)
    nothing: Any = None
    return evaluate(shipments, replay, nothing, meter, merged=merged, streamed=streamed), replay


BESIDE = (Numbers.BESIDE, None)
FOUND = {WHOLE.key: 12.0, ROUNDED.key: 13.0, BASE.key: 14.0, BESIDE: 15.0}


def test_what_the_activations_went_through_is_measured_first_and_nothing_twice() -> None:
    result, replay = measured([WHOLE, ALSO_WHOLE, ROUNDED, BASE], FOUND, merged=False, streamed=BASE.key)
    assert replay.asked == [WHOLE.key, ROUNDED.key]
    assert replay.numbers == [(0, 3), (1, 3), (2, 3)]
    assert replay.heads == [1.0, 1.0, 2.0], "a format that rounds has a head of its own"
    assert result.quality.perplexity == 12.0
    assert [way.figures.perplexity for way in result.shipped] == [12.0, 12.0, 13.0, 14.0]
    assert [way.whole for way in result.shipped] == [True, True, True, False]
    assert result.before_merge is None


def test_a_merge_is_measured_as_it_was_trained_besides() -> None:
    result, replay = measured([WHOLE], FOUND, merged=True, streamed=None)
    assert replay.asked == [WHOLE.key, BESIDE]
    assert result.before_merge.perplexity == 15.0
    assert [way.checkpoints for way in result.shipped] == [("merged",)]


def test_only_a_result_that_is_not_finite_ends_the_job() -> None:
    """What is a part of it, or was only trained so, may be anything."""
    result, _ = measured([WHOLE, BASE], FOUND | {BASE.key: -1.0, BESIDE: -1.0}, merged=True, streamed=None)
    assert [way.checkpoints for way in result.shipped] == [("merged",)]
    assert result.before_merge is None
    for key in (WHOLE.key, ROUNDED.key):
        with pytest.raises(NumericalFailure):
            measured([WHOLE, ROUNDED], FOUND | {key: -1.0}, merged=False, streamed=None)
