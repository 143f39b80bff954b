"""Block by block: targets from the original stream, the method, the quantized weights in place, the next inputs.

A linear with a low-rank correction gets the sum in one matrix, so that the quantized stream sees the corrected block.

While a block is worked on, the next one is read (`workers.engine.device.read_ahead`) and the one before it is packed
and made
durable (`workers.engine.device.write_behind`). Between blocks nothing waits for the device but the thread that writes.

What a kill costs: a method's word on its progress, and its result, are taken only when the block before is durable. So
of all blocks whose method ended at most one is lost, with what was done of the block in hand; and where the method
tells its progress (the tuning loop does after a third of its steps), that is less than a block.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme, WeightSpec
from bitwright.errors import InternalError
from bitwright.events import BlockEvent, Stage
from bitwright.report import BlockReport
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.engine.clock import StageClock
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup, checksum
from workers.engine.device.write_behind import WriteBehind
from workers.engine.model.overflow import blaming_the_original
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan
from workers.engine.quantize.activations import Activations, second_moments, sum_moments
from workers.engine.quantize.base_job import BaseJobResult
from workers.engine.quantize.block_reader import BlockReader
from workers.engine.quantize.block_report import BlockFindings, error_sums
from workers.engine.quantize.finished_blocks import FinishedBlocks, Shard
from workers.engine.quantize.preparation import Prepared
from workers.engine.quantize.reference import rounded
from workers.engine.quantize.registry import METHODS, method_of
from workers.engine.reporter import Reporter
from workers.engine.seeds import derived_seed
from workers.engine.tune.tuner import Tuner
from workers.numerics.quantized import LinearResult


@dataclass(frozen=True)
class BlockPass:
    """What the pass works with.

    calibration   what the method observes; None where it looks at weights alone
    evaluation    what judges the result; rides along in the same pass
    schemes       of every quantized linear, by full name
    prepared      what was found out about the whole model before
    processes         who takes the same pass over other windows; what is exchanged, the main thread exchanges
    """

    model: StreamedModel
    spec: WeightSpec
    schemes: Mapping[str, Scheme]
    plan: Plan
    seed: int
    calibration: Activations | None
    evaluation: Activations | None
    prepared: Prepared
    tuner: Tuner
    state: FinishedBlocks
    clock: StageClock
    reporter: Reporter
    processes: ProcessGroup = SINGLE_PROCESS
    base_job: BaseJobResult | None = None

    def run(self) -> tuple[BlockReport, ...]:
        """Quantizes or takes over every block that `state` does not hold; replays the others. All are durable then.

        Raises:
            NumericalFailure: a weight or an output is not finite; it says whether the original model's is.
            InternalError: the ranks have computed different weights for a block.
        """
        with blaming_the_original(self.model.dtype, self._original_states):
            return self._run()

    def _original_states(self) -> list[Tensor]:
        return [stream.original for stream in (self.calibration, self.evaluation) if stream is not None]

    def _run(self) -> tuple[BlockReport, ...]:
        total, resumed = len(self.model.blocks), self.state.resumed
        progress = _Progress(self.reporter, total)
        with WriteBehind(self.model.device) as writer, closing(BlockReader(self.model, self.state).blocks()) as blocks:
            for index in range(total):
                progress.begin(index)
                block = next(blocks)
                with self.model.filled(block.original):
                    if index < resumed:
                        self._replay(index, block.quantized)
                    else:
                        self._quantize(index, progress, writer)
                progress.end(index, computed=index >= resumed)
        return tuple(block.report for block in self.state.blocks[:total] if block.report is not None)

    def replay_quantized(self, stream: Activations) -> None:
        """X_q of a rewound stream through all blocks again, with the weights that are durable now."""
        with closing(BlockReader(self.model, self.state).quantized_blocks()) as blocks:
            for index, block in enumerate(blocks):
                with self.model.filled(block.original):
                    stream.advance_quantized(index, self.model.blocks[index])

    def quantize_head(self) -> Tensor | None:
        """Rounds the head to nearest, if it is to be quantized; its dequantized weight."""
        head, index = self.model.layout.head, len(self.model.blocks)
        if head not in self.schemes:
            return None
        if index >= self.state.resumed:
            self.state.save(index, {head: self._head(index, head)}, None)
            self.state.settle()
        return self.state.load(index)[head].dequantize()

    def _head(self, index: int, head: str) -> LinearResult:
        if self.base_job is not None:
            return self.base_job.linear(head)
        with self.model.loaded(head):
            container = nn.ModuleDict({"head": self.model.model.get_submodule(head)})
            task = self._task(index, container, {"head": self.schemes[head]}, {}, lambda _: None)
            return METHODS["rtn"].quantize_block(task, self.spec).linears["head"]

    def _quantize(self, index: int, progress: "_Progress", writer: WriteBehind) -> None:
        started = time.perf_counter()
        block, prefix = self.model.blocks[index], self.model.layout.block(index)
        schemes = {n: self.schemes[f"{prefix}.{n}"] for n in self._quantized_linears(index)}
        observed = self.calibration or self.evaluation
        with second_moments({n: self.model.block_linears(index)[n] for n in schemes}) as moments:
            self._advance_original(index, block, only=observed)
            sum_moments(self.processes, moments, {n: self.model.block_linears(index)[n] for n in schemes})
        self._advance_original(index, block, only=self.evaluation if self.calibration else None)
        self._advance_reference(index, block)

        def tick(share: float) -> None:
            writer.wait()
            progress.tick(index, share)

        if self.base_job is not None:
            result = self.base_job.block(index)
        else:
            task = self._task(index, block, schemes, moments, tick)
            result = _quantize_block(task, self.spec) if schemes else BlockResult({})
        self._demand_agreement(index, result)
        writer.wait()
        shard = writer.give(partial(self._write_shard, index, result))
        errors = self._put(index, result, moments)
        self._advance_quantized(index, block)
        output = None if observed is None else observed.squared_error()
        self.processes.sum_(*([] if output is None else [output]))
        findings = BlockFindings(index, prefix, started, result, errors, output)
        writer.give(partial(self._finish, shard, findings))

    def _demand_agreement(self, index: int, result: BlockResult) -> None:
        made = (*result.linears.values(), *result.parameters.values())
        if not self.processes.alone and not self.processes.agree(checksum(made)):
            raise InternalError(f"block {index}: the ranks have computed different weights")

    def _write_shard(self, index: int, result: BlockResult) -> Shard:
        prefix = self.model.layout.block(index)
        linears = {f"{prefix}.{name}": linear for name, linear in result.linears.items()}
        return self.state.write_shard(index, linears, {f"{prefix}.{n}": v for n, v in result.parameters.items()})

    def _finish(self, shard: Future[Shard], findings: BlockFindings) -> None:
        """Makes a block count, and tells of it when it does."""
        report = findings.report()
        report = report if self.base_job is None else self.base_job.told(report)
        self.state.finish(findings.index, shard.result(), report)
        self.reporter.block(_event(report, len(self.model.blocks)))

    def _replay(self, index: int, quantized: dict[str, Tensor]) -> None:
        block, prefix = self.model.blocks[index], self.model.layout.block(index)
        for stream in (self.calibration, self.evaluation):
            self._advance_original(index, block, only=stream)
        self._advance_reference(index, block)
        for name in list(quantized):
            self._replace(index, name.removeprefix(prefix + "."), quantized.pop(name))
        self._advance_quantized(index, block)

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
            inputs_fp=empty if stream is None or stream.inputs_fp is None else stream.inputs_fp,
            targets=empty if stream is None else stream.original,
            schemes=schemes,
            moments=moments,
            scale_dtype=self.plan.scale_dtype,
            device=self.model.device,
            seed=derived_seed(self.seed, index),
            micro_batch=self.plan.micro_batch,
            tick=tick,
            tune=self.tuner.tune,
            folds=self.model.layout.folds,
            log=self.reporter.log,
            sum_=self.processes.sum_,
            quantize=_quantize_block,
            absmax=absmax,
            fisher=fisher,
        )

    def _advance_original(self, index: int, block: nn.Module, only: Activations | None) -> None:
        if only is not None:
            with self.clock.during(self._stage_of(only)):
                only.advance_original(index, block)

    def _advance_reference(self, index: int, block: nn.Module) -> None:
        """Before anything changes the block's weights."""
        stream, prefix = self.evaluation, self.model.layout.block(index)
        if stream is None or stream.reference is None:
            return
        schemes = {name: self.schemes[f"{prefix}.{name}"] for name in self._quantized_linears(index)}
        with (
            self.clock.during(Stage.EVALUATE),
            rounded(self.model.block_linears(index), schemes, self.plan.scale_dtype),
        ):
            stream.advance_reference(index, block)

    def _advance_quantized(self, index: int, block: nn.Module) -> None:
        for stream in (self.calibration, self.evaluation):
            if stream is not None:
                with self.clock.during(self._stage_of(stream)):
                    stream.advance_quantized(index, block)

    def _stage_of(self, stream: Activations) -> Stage:
        return Stage.EVALUATE if stream is self.evaluation else Stage.QUANTIZE

    def _put(self, index: int, result: BlockResult, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts what the results stand for, and what changed with them, into the block.

        How far the weights are from the original ones, by linear; scales that moved are taken back for that.
        """
        errors = {}
        for name, linear in result.linears.items():
            original = self.model.block_linears(index)[name].weight
            value = linear.to(self.model.device).dequantize()
            errors[name] = error_sums(linear.scaling.undo(value), original, moments.get(name))
            self._replace(index, f"{name}.weight", value)
        for name, value in result.parameters.items():
            self._replace(index, name, value.to(self.model.device))
        return errors

    def _replace(self, index: int, parameter: str, value: Tensor) -> None:
        owner, _, leaf = parameter.rpartition(".")
        setattr(self.model.blocks[index].get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _quantize_block(task: BlockTask, spec: WeightSpec) -> BlockResult:
    return method_of(spec).quantize_block(task, spec)


def _no_forward(block: Callable[..., Any], hidden: Tensor) -> Tensor:
    raise TypeError(f"{block} is given to a method without inputs: {tuple(hidden.shape)}")


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
