"""Block by block: targets from the original stream, the method, the quantized weights in place, the next inputs.

A linear with a low-rank correction gets the sum in one matrix, so that the quantized stream sees the corrected block.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.errors import NumericalFailure
from app.domain.events import BlockEvent, Stage
from app.domain.methods import Form, Scheme, WeightSpec
from app.domain.report import BlockReport, LinearReport
from workers.contracts import BlockTask
from workers.engine.blocks import StreamedModel
from workers.engine.clock import StageClock
from workers.engine.plan import Plan, block_seed
from workers.engine.preparation import Prepared
from workers.engine.registry import METHODS
from workers.engine.reporter import Reporter
from workers.engine.resume import ResumeState
from workers.engine.streams import Stream, second_moments
from workers.engine.tuning import Tuner
from workers.numerics.quantized import BlockResult, CodebookWeight, LinearResult


@dataclass(frozen=True)
class BlockPass:
    """What the pass works with.

    calibration   what the method observes; None where it looks at weights alone
    evaluation    what judges the result; rides along in the same pass
    schemes       of every quantized linear, by full name
    prepared      what was found out about the whole model before
    """

    model: StreamedModel
    spec: WeightSpec
    schemes: Mapping[str, Scheme]
    plan: Plan
    seed: int
    calibration: Stream | None
    evaluation: Stream | None
    prepared: Prepared
    tuner: Tuner
    state: ResumeState
    clock: StageClock
    reporter: Reporter

    def run(self) -> tuple[BlockReport, ...]:
        """Quantizes every block that `state` does not hold; replays the others forward.

        Raises:
            NumericalFailure: an output is not finite.
        """
        total = len(self.model.blocks)
        progress = _Progress(self.reporter, total)
        reports = []
        for index in range(total):
            progress.begin(index)
            with self.model.loaded(self.model.layout.block(index)):
                finished = self.state.blocks[index].report if index < self.state.resumed else None
                reports.append(self._replay(index, finished) if finished else self._quantize(index, progress))
            progress.end(index, computed=finished is None)
        return tuple(reports)

    def replay_quantized(self, stream: Stream) -> None:
        """X_q of a rewound stream through all blocks again, with the weights that are durable now."""
        for index, block in enumerate(self.model.blocks):
            weights = {f"{n}.weight": r.to(self.model.device).dequantize() for n, r in self.state.load(index).items()}
            with self.model.loaded(self.model.layout.block(index), given=weights):
                stream.advance_quantized(index, block)

    def quantize_head(self) -> Tensor | None:
        """Rounds the head to nearest, if it is to be quantized; its dequantized weight."""
        head, index = self.model.layout.head, len(self.model.blocks)
        if head not in self.schemes:
            return None
        if index >= self.state.resumed:
            with self.model.loaded(head):
                container = nn.ModuleDict({"head": self.model.model.get_submodule(head)})
                task = self._task(index, container, {"head": self.schemes[head]}, {}, lambda _: None)
                result = METHODS["rtn"].quantize_block(task, self.spec)
            self.state.save(index, {head: result.linears["head"]}, None)
        return self.state.load(index)[head].dequantize()

    def _quantize(self, index: int, progress: "_Progress") -> BlockReport:
        started = time.perf_counter()
        block, prefix = self.model.blocks[index], self.model.layout.block(index)
        schemes = {n: self.schemes[f"{prefix}.{n}"] for n in self._quantized_linears(index)}
        with second_moments({n: self.model.block_linears(index)[n] for n in schemes}) as moments:
            observed = self.calibration or self.evaluation
            self._advance_original(index, block, only=observed)
        self._advance_original(index, block, only=self.evaluation if self.calibration else None)
        task = self._task(index, block, schemes, moments, lambda share: progress.tick(index, share))
        method = METHODS[self.spec.model_dump()["method"]]
        result = method.quantize_block(task, self.spec) if schemes else BlockResult({})
        linears = self._put(index, result, moments)
        self._advance_quantized(index, block)
        report = self._report(index, result, linears, time.perf_counter() - started)
        self.state.save(index, {f"{prefix}.{n}": r for n, r in result.linears.items()}, report)
        self.reporter.block(_event(report, len(self.model.blocks)))
        return report

    def _replay(self, index: int, report: BlockReport) -> BlockReport:
        block, prefix = self.model.blocks[index], self.model.layout.block(index)
        for stream in (self.calibration, self.evaluation):
            self._advance_original(index, block, only=stream)
        for name, linear in self.state.load(index).items():
            self._replace(index, name.removeprefix(prefix + "."), linear)
        self._advance_quantized(index, block)
        return report

    def _quantized_linears(self, index: int) -> list[str]:
        prefix = self.model.layout.block(index)
        return [name for name in self.model.block_linears(index) if f"{prefix}.{name}" in self.schemes]

    def _task(
        self,
        index: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        moments: Mapping[str, Tensor],
        tick: Callable[[float], None],
    ) -> BlockTask:
        stream = self.calibration
        empty = torch.empty(0, 0, 0, dtype=self.model.dtype)
        is_block = index < len(self.model.blocks)
        absmax, fisher = self.prepared.of_block(self.model.layout.block(index))
        return BlockTask(
            index=index,
            block=block,
            forward=stream.call(index) if stream is not None and is_block else _no_forward,
            inputs=empty if stream is None else stream.quantized,
            inputs_fp=empty if stream is None else stream.inputs_fp,
            targets=empty if stream is None else stream.original,
            schemes=schemes,
            moments=moments,
            scale_dtype=getattr(torch, self.plan.scale_dtype),
            device=self.model.device,
            seed=block_seed(self.seed, index),
            micro_batch=self.plan.micro_batch,
            tick=tick,
            tune=self.tuner.tune,
            absmax=absmax,
            fisher=fisher,
        )

    def _advance_original(self, index: int, block: nn.Module, only: Stream | None) -> None:
        if only is not None:
            with self.clock.during(self._stage_of(only)):
                only.advance_original(index, block)

    def _advance_quantized(self, index: int, block: nn.Module) -> None:
        for stream in (self.calibration, self.evaluation):
            if stream is not None:
                with self.clock.during(self._stage_of(stream)):
                    stream.advance_quantized(index, block)

    def _stage_of(self, stream: Stream) -> Stage:
        return Stage.EVALUATE if stream is self.evaluation else Stage.QUANTIZE

    @torch.no_grad()
    def _put(self, index: int, result: BlockResult, moments: Mapping[str, Tensor]) -> tuple[LinearReport, ...]:
        """Puts the weights that the results stand for into the block; how far they are from the original ones."""
        reports = []
        for name, linear in result.linears.items():
            original = self.model.block_linears(index)[name].weight.float()
            change = self._replace(index, name, linear).float() - original
            reports.append(
                LinearReport(
                    name=f"{self.model.layout.block(index)}.{name}",
                    shape=linear.weight.shape,
                    form=Form.CODEBOOK if isinstance(linear.weight, CodebookWeight) else Form.AFFINE,
                    **linear.weight.scheme.model_dump(),
                    rank=None if linear.low_rank is None else linear.low_rank.rank,
                    weight_error=_ratio(change, original, None),
                    output_error=_ratio(change, original, moments[name]) if name in moments else None,
                )
            )
        return tuple(reports)

    def _replace(self, index: int, name: str, linear: LinearResult) -> Tensor:
        value = linear.to(self.model.device).dequantize()
        self.model.block_linears(index)[name].weight = nn.Parameter(value, requires_grad=False)
        return value

    def _report(
        self, index: int, result: BlockResult, linears: tuple[LinearReport, ...], seconds: float
    ) -> BlockReport:
        observed = self.calibration or self.evaluation
        error = observed.output_error() if observed is not None else None
        for value in (error, result.loss):
            if value is not None and not math.isfinite(value):
                raise NumericalFailure(
                    f"block {index}: the output error is {value}",
                    field="quantization",
                    hint="use more bits, smaller groups or a lower learning rate",
                )
        return BlockReport(
            index=index,
            name=self.model.layout.block(index),
            loss_initial=result.loss_initial,
            loss=result.loss,
            output_error=error,
            seconds=seconds,
            linears=linears,
        )


def _no_forward(block: Callable[..., Any], hidden: Tensor) -> Tensor:
    raise TypeError(f"{block} is given to a method without inputs: {tuple(hidden.shape)}")


def _ratio(change: Tensor, original: Tensor, moments: Tensor | None) -> float:
    """||change|| / ||original||, columns weighted by `moments` (in_features,)."""
    norms = [m.square().sum(0, dtype=torch.float64) for m in (change, original)]
    if moments is not None:
        norms = [norm * moments.double() for norm in norms]
    difference, total = (float(norm.sum()) for norm in norms)
    return (difference / total) ** 0.5 if total else 0.0


def _event(report: BlockReport, total: int) -> BlockEvent:
    return BlockEvent(
        index=report.index,
        total=total,
        name=report.name,
        loss_initial=report.loss_initial,
        loss=report.loss,
        seconds=report.seconds,
    )


class _Progress:
    """Progress of the pass, with the time left from the blocks that were measured."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter = reporter
        self._total = total
        self._started = 0.0
        self._measured: list[float] = []

    def begin(self, index: int) -> None:
        self._started = time.monotonic()
        self.tick(index, 0.0)

    def tick(self, index: int, share: float) -> None:
        elapsed = time.monotonic() - self._started
        a_block = sum(self._measured) / len(self._measured) if self._measured else None
        if a_block is None and share > 0.05:
            a_block = elapsed / share
        left = None if a_block is None else max(0.0, (self._total - index - share) * a_block)
        self._reporter.progress(Stage.QUANTIZE, index + min(share, 0.999), self._total, "blocks", left)

    def end(self, index: int, *, computed: bool) -> None:
        if computed:
            self._measured.append(time.monotonic() - self._started)
        if index + 1 == self._total:
            self._reporter.progress(Stage.QUANTIZE, self._total, self._total, "blocks")
