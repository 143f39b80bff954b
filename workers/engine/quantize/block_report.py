"""Report of a quantized block: sums made on the device with the block, numbers read once, when it is done.

For a linear W, its change D = W_hat - W (W_hat with its low-rank correction) and its inputs' second moments m, and for
the block's output Y:

    weight_error = sqrt(sum D^2 / sum W^2)          output_error = sqrt(sum_ij m_j D_ij^2 / sum_ij m_j W_ij^2)
    of the block: output_error = ||Y - Y_hat|| / ||Y||
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.errors import NumericalFailure
from bitwright.report import BlockReport, LinearReport
from workers.contracts.results import BlockResult
from workers.engine.model.overflow import ALSO_DTYPE
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import CHUNK_ELEMENTS
from workers.engine.quantize.expert_coverage import Coverage
from workers.numerics.quantized import LinearResult


@dataclass(frozen=True)
class BlockFindings:
    """A block that is done, but for what the device still computes.

    name     of the block; its linears' names are below it
    started  `time.perf_counter` then
    linears  `error_sums` by name inside the block
    output   `Activations.squared_error` after the block; None if nothing was observed
    coverage tokens of its experts
    """

    index: int
    name: str
    started: float
    result: BlockResult
    linears: Mapping[str, Tensor]
    output: Tensor | None
    coverage: Coverage = field(default_factory=Coverage)

    def report(self) -> BlockReport:
        """Waits for the device, once.

        Raises:
            NumericalFailure: the block's output or the method's loss is not finite.
        """
        sums = list(self.linears.values()) + ([] if self.output is None else [self.output])
        numbers = iter(torch.cat(sums).tolist() if sums else [])
        linears = tuple(self._linear(name, [next(numbers) for _ in own]) for name, own in self.linears.items())
        error = None if self.output is None else _ratio(next(numbers), next(numbers))
        losses = [None if loss is None else float(loss) for loss in (self.result.loss_initial, self.result.loss)]
        for value in (error, *losses):
            self._demand_finite(value)
        return BlockReport(
            index=self.index,
            name=self.name,
            loss_initial=losses[0],
            loss=losses[1],
            output_error=error,
            seconds=time.perf_counter() - self.started,
            linears=linears,
            counters={name: float(count) for name, count in self.result.counters.items()},
            experts=self.coverage.report(self.name),
        )

    def _linear(self, name: str, sums: list[float]) -> LinearReport:
        return _linear_report(f"{self.name}.{name}", self.result.linears[name], sums)

    def _demand_finite(self, value: float | None) -> None:
        if value is not None and not math.isfinite(value):
            raise NumericalFailure(
                f"block {self.index}: the output error is {value}",
                field="quantization",
                hint="use more bits, smaller groups or a lower learning rate" + ALSO_DTYPE,
            )


def _linear_report(name: str, result: LinearResult, sums: list[float]) -> LinearReport:
    weight, low_rank = result.weight, result.low_rank
    return LinearReport(
        name=name,
        shape=weight.shape,
        form=weight.form,
        **weight.scheme.model_dump(exclude={"name"}),
        scheme=weight.scheme.name,
        rank=None if low_rank is None else low_rank.rank,
        weight_error=_ratio(*sums[:2]),
        output_error=_ratio(*sums[2:]) if sums[2:] else None,
    )


def report_of_head(model: StreamedModel, stored: Mapping[str, LinearResult]) -> LinearReport:
    """Of the output head, which is quantized; `stored` has it by its full name."""
    name = model.layout.head
    with model.loaded(name):
        original = model.model.get_submodule(name).weight
        assert isinstance(original, Tensor)  # noqa: S101 - for the type checker
        sums = error_sums(stored[name].to(model.device).dequantize(), original, None)
    return _linear_report(name, stored[name], sums.tolist())


@torch.no_grad()
def error_sums(quantized: Tensor, original: Tensor, moments: Tensor | None) -> Tensor:
    """sum D^2 and sum W^2, then both with columns weighted by `moments` (in,) if given: fp64 (2,) or (4,).

    Weights (out, in) of any float dtype; some rows at a time are held in fp32. Nothing waits for the device.
    """
    columns = torch.zeros(2, original.shape[1], dtype=torch.float64, device=original.device)
    rows = max(1, CHUNK_ELEMENTS[original.device.type] // original.shape[1])
    for w_hat, w in zip(torch.split(quantized, rows), torch.split(original, rows), strict=True):
        columns[0] += (w_hat.float() - w.float()).square_().sum(0, dtype=torch.float64)
        columns[1] += w.float().square().sum(0, dtype=torch.float64)
    weighted = columns if moments is None else torch.cat([columns, columns * moments.double()])
    return weighted.sum(1)


def _ratio(error: float, reference: float) -> float:
    return math.sqrt(error / reference) if reference else 0.0
