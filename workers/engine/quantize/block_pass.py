"""The block loop: original outputs as targets, the method, quantized weights in place, inputs of the next block.

A linear with a low-rank correction gets the sum in one matrix: the quantized activations pass the corrected block.

While a block is quantized, the next one is read (`workers.engine.device.read_ahead`) and the one before it is packed
and made durable (`workers.engine.device.write_behind`). Between blocks only the writing thread waits for the device.

Cost of a kill: a method's progress and result count only when the block before is durable. So of all blocks whose
method ended at most one is lost, with the work on the current block; where the method reports progress (the tuning loop
does after a third of its steps), that is less than a block.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.format_rules import makes_gguf
from app.domain.methods import Scheme, WeightSpec
from bitwright.errors import InternalError
from bitwright.events import Stage
from bitwright.report import BlockReport
from workers.contracts.blocks import BlockTask
from workers.contracts.input_squares import InputSquares
from workers.contracts.kv_cache import KVScales
from workers.contracts.results import BlockResult
from workers.engine.device.process_group import checksum
from workers.engine.device.write_behind import WriteBehind
from workers.engine.finished_blocks import Shard
from workers.engine.job import Job
from workers.engine.model.overflow import blaming_the_original
from workers.engine.quantize.activations import Activations, counted_inputs, second_moments, sum_moments
from workers.engine.quantize.block_progress import BlockProgress, block_event
from workers.engine.quantize.block_reader import BlockReader
from workers.engine.quantize.block_report import BlockFindings, error_sums
from workers.engine.quantize.cache_states import CacheWatch, attention_of
from workers.engine.quantize.expert_coverage import (
    Coverage,
    borrowed_moments,
    complete,
    counted,
    coverage,
    starved_warning,
)
from workers.engine.quantize.reference import rounded
from workers.engine.quantize.registry import method_of
from workers.engine.quantize.serving import Measured, Served, cache_scales, set_amax, with_input_amax
from workers.engine.seeds import derived_seed
from workers.engine.tune.tuner import Tuner
from workers.numerics.floats.input_rounding import InputRounding, input_roundings
from workers.numerics.quantized import LinearResult


@dataclass(frozen=True)
class _Seen:
    """Findings of the passes through an original block.

    moments    `second_moments`, of starved experts those of tokens that they borrowed, too
    columns    largest magnitudes of the inputs of calibrated linears, by column
    joined     linears that a runtime makes one matrix of
    cache      scales of the attention's cache
    inputs     sums of the linears' squared inputs in the calibration text, where they are kept
    """

    schemes: Mapping[str, Scheme]
    moments: dict[str, Tensor]
    coverage: Coverage
    columns: Mapping[str, Tensor]
    joined: Sequence[tuple[str, ...]]
    cache: KVScales | None
    inputs: Mapping[str, InputSquares]

    def amax(self, results: Mapping[str, LinearResult] | None = None) -> dict[str, Tensor]:
        """`set_amax` of the block's linears."""
        return set_amax(self.columns, self.joined, self.schemes, results)

    @property
    def roundings(self) -> dict[str, InputRounding]:
        """Those of inputs, as long as no scale has moved."""
        return input_roundings(self.schemes, self.amax())


@dataclass(frozen=True)
class BlockPass:
    """A pass through the blocks of a job.

    calibration   activations that the method observes; None where it looks at weights alone
    evaluation    activations that the result is measured on; they take the same pass
    tuner         exchanges gradients with the other processes, as the main thread exchanges everything else
    ready         called before a block is given to the method, and may refuse to go on
    further       activations that take the original blocks' pass alone
    """

    job: Job
    calibration: Activations | None
    evaluation: Activations | None
    tuner: Tuner
    ready: Callable[[], object] = lambda: None
    further: Activations | None = None

    def run(self) -> tuple[BlockReport, ...]:
        """Quantizes or takes over every block that is not finished; replays the others. All are durable then.

        Raises:
            NumericalFailure: a weight or an output is not finite; it says whether the original model's is.
            InternalError: the processes have computed different weights for a block.
        """
        with blaming_the_original(self.job.model.dtype, self._original_states):
            return self._run()

    def _original_states(self) -> list[Tensor]:
        texts = (self.calibration, self.evaluation, self.further)
        return [each.original for each in texts if each is not None]

    def _run(self) -> tuple[BlockReport, ...]:
        total, resumed = len(self.job.model.blocks), self.job.finished_blocks.resumed
        progress = BlockProgress(self.job.reporter, total)
        reader = BlockReader(self.job.model, self.job.finished_blocks)
        with WriteBehind(self.job.model.device) as writer, closing(reader.blocks()) as blocks:
            for index in range(total):
                progress.begin(index)
                block = next(blocks)
                with self.job.model.filled(block.original):
                    if index < resumed:
                        self._replay(index, block.quantized)
                    else:
                        self._quantize(index, progress, writer)
                progress.end(index, computed=index >= resumed)
        reports = [block.report for block in self.job.finished_blocks.blocks[:total] if block.report is not None]
        warning = starved_warning(reports)
        if warning is not None:
            self.job.reporter.warning("experts_starved", warning)
        return tuple(reports)

    def _quantize(self, index: int, progress: BlockProgress, writer: WriteBehind) -> None:
        started = time.perf_counter()
        block, prefix = self.job.model.blocks[index], self.job.model.layout.block(index)
        schemes = {n: self.job.schemes[f"{prefix}.{n}"] for n in self._quantized_linears(index)}
        seen = self._look(index, block, schemes)
        base = None if self.job.base_job is None else self.job.base_job.block(index)
        self._serve(index, Served(seen.roundings, seen.cache) if base is None else self._served(base, seen.cache))
        self._advance_reference(index, block)

        def tick(share: float) -> None:
            writer.wait()
            progress.tick(index, share)

        self.ready()
        result = self._result(index, block, seen, tick) if base is None else base
        self._demand_agreement(index, result)
        writer.wait()
        shard = writer.give(partial(self._write_shard, index, result, seen.cache, seen.inputs))
        errors = self._put(index, result, seen.moments)
        self._serve(index, self._served(result, seen.cache))
        self._advance_quantized(index, block)
        observed = self.calibration or self.evaluation
        output = None if observed is None else observed.squared_error()
        self.job.processes.sum_(*([] if output is None else [output]))
        findings = BlockFindings(index, prefix, started, result, errors, output, seen.coverage)
        writer.give(partial(self._finish, shard, findings))

    def _look(self, index: int, block: nn.Module, schemes: Mapping[str, Scheme]) -> "_Seen":
        """Takes all texts through the original block; what shows in it."""
        observed = self.calibration or self.evaluation
        linears = {n: linear for n, linear in self.job.model.block_linears(index).items() if n in schemes}
        measured = Measured.of(linears, schemes, self._caches, calibrates=self.calibration is not None)
        with second_moments(linears) as moments, counted(block, self.job.model.device) as tokens:
            with measured.inputs.watching(), counted_inputs(linears) as counts:
                self._advance_original(index, block, only=observed, cache=measured.cache)
            sum_moments(self.job.processes, moments, linears)
        found = self._coverage(tokens, schemes, block)
        self._advance_original(index, block, only=self.evaluation if self.calibration else None)
        self._advance_original(index, block, only=self.further)
        columns = measured.inputs.columns(self.job.processes)
        joined, cache = self.job.model.joined(index), self._cache_scales(index, measured)
        return _Seen(schemes, moments, found, columns, joined, cache, self._input_squares(moments, counts))

    def _input_squares(self, moments: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, InputSquares]:
        """Of the calibration text, where a file for llama.cpp is or can be made: beside it is an importance matrix."""
        if self.calibration is None or not self._makes_gguf:
            return {}
        total = self.job.processes.total
        found = {name: total(counts.get(name, 0)) for name in sorted(moments)}
        # Starved experts' moments are replaced later, in the same mapping.
        return {name: InputSquares(moments[name].cpu(), count) for name, count in found.items()}

    @cached_property
    def _makes_gguf(self) -> bool:
        model_type = str(self.job.model.checkpoint.config.get("model_type"))
        return makes_gguf(self.job.spec, self.job.request.formats, self.job.spec.forms(), model_type)

    def _result(self, index: int, block: nn.Module, seen: "_Seen", tick: Callable[[float], None]) -> BlockResult:
        """The method's result for the block, with the numbers of inputs that its schemes store."""
        starved = seen.coverage.linears(block, list(seen.schemes))
        seen.moments.update(self._borrowed_moments(index, seen.coverage, starved))
        task = self._task(index, block, seen.schemes, seen.moments, tick)
        task = replace(task, starved=starved, joined=seen.joined, input_amax=seen.amax())
        with complete(block, seen.coverage.starved):
            result = _quantize_block(task, self.job.spec) if seen.schemes else BlockResult({})
        return replace(result, linears=with_input_amax(result.linears, seen.amax(result.linears)))

    def _served(self, result: BlockResult, cache: KVScales | None) -> Served:
        return Served.of(result.linears, cache, self.job.model.device)

    @property
    def _caches(self) -> bool:
        """True if scales of a cache are measured or taken over."""
        return self.job.spec.kv_cache is not None

    def _serve(self, index: int, served: Served) -> None:
        for activations in (self.calibration, self.evaluation):
            if activations is not None:
                activations.served[index] = served

    def _cache_scales(self, index: int, measured: Measured) -> KVScales | None:
        if not self._caches:
            return None
        if self.job.base_job is not None:
            return self.job.base_job.cache_scales(self._attention(index))
        device = self.job.model.device
        return None if measured.cache is None else cache_scales(measured.cache, self.job.processes, device)

    def _attention(self, index: int) -> str | None:
        """Full name of a block's attention."""
        name = attention_of(self.job.model.blocks[index])
        return None if name is None else f"{self.job.model.layout.block(index)}.{name}"

    def _coverage(self, tokens: dict[str, Tensor], schemes: Mapping[str, Scheme], block: nn.Module) -> Coverage:
        """Of the calibration text; nothing where none is read."""
        if self.calibration is None or not tokens:
            return Coverage()
        self.job.processes.sum_(*tokens.values())
        return coverage(tokens, schemes, block)

    def _borrowed_moments(self, index: int, found: Coverage, starved: frozenset[str]) -> dict[str, Tensor]:
        if not starved or self.calibration is None:
            return {}
        inputs = self.calibration.quantized if self.calibration.inputs_fp is None else self.calibration.inputs_fp
        block, forward = self.job.model.blocks[index], self.calibration.call(index)
        device, processes = self.job.model.device, self.job.processes
        return borrowed_moments(block, forward, inputs, found, sorted(starved), device=device, processes=processes)

    def _demand_agreement(self, index: int, result: BlockResult) -> None:
        tensors = (*result.linears.values(), *result.parameters.values())
        if not self.job.processes.alone and not self.job.processes.agree(checksum(tensors)):
            raise InternalError(f"block {index}: the processes have computed different weights")

    def _write_shard(
        self, index: int, result: BlockResult, cache: KVScales | None, inputs: Mapping[str, InputSquares]
    ) -> Shard:
        prefix = self.job.model.layout.block(index)
        linears = {f"{prefix}.{name}": linear for name, linear in result.linears.items()}
        parameters = {f"{prefix}.{name}": value for name, value in result.parameters.items()}
        attention = self._attention(index)
        caches = {} if cache is None or attention is None else {attention: cache}
        squares = {f"{prefix}.{name}": each for name, each in inputs.items()}
        return self.job.finished_blocks.write_shard(index, linears, parameters, caches, squares)

    def _finish(self, shard: Future[Shard], findings: BlockFindings) -> None:
        """Makes a block count, and reports it then."""
        report = findings.report()
        report = report if self.job.base_job is None else self.job.base_job.corrected(report)
        self.job.finished_blocks.finish(findings.index, shard.result(), report)
        event = block_event(report, len(self.job.model.blocks), self.job.rounds_before)
        self.job.reporter.block(event, findings.started)

    def _replay(self, index: int, quantized: dict[str, Tensor]) -> None:
        block, prefix = self.job.model.blocks[index], self.job.model.layout.block(index)
        for activations in (self.calibration, self.evaluation, self.further):
            self._advance_original(index, block, only=activations)
        self._serve(index, self._finished_serving(index, prefix))
        self._advance_reference(index, block)
        for name in list(quantized):
            self._replace(index, name.removeprefix(prefix + "."), quantized.pop(name))
        self._advance_quantized(index, block)

    def _finished_serving(self, index: int, prefix: str) -> Served:
        """The roundings of a finished block; nothing is read where its schemes say of none."""
        schemes = [self.job.schemes[f"{prefix}.{name}"] for name in self._quantized_linears(index)]
        if not self._caches and not any(s.row is not None and s.row.activations is not None for s in schemes):
            return Served()
        linears = {n.removeprefix(f"{prefix}."): r for n, r in self.job.finished_blocks.load(index).items()}
        cache = next(iter(self.job.finished_blocks.caches(index).values()), None)
        return Served.of(linears, cache, self.job.model.device)

    def _quantized_linears(self, index: int) -> list[str]:
        prefix = self.job.model.layout.block(index)
        return [name for name in self.job.model.block_linears(index) if f"{prefix}.{name}" in self.job.schemes]

    def _task(
        self,
        index: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        moments: Mapping[str, Tensor],
        tick: Callable[[float], None],
    ) -> BlockTask:
        activations = self.calibration
        empty = torch.empty(0, 0, 0, dtype=self.job.model.dtype)
        absmax, fisher = self.job.prepared.of_block(self.job.model.layout.block(index))
        return BlockTask(
            index=index,
            block=block,
            forward=activations.call(index) if activations is not None else _no_forward,
            inputs=empty if activations is None else activations.quantized,
            inputs_fp=empty if activations is None or activations.inputs_fp is None else activations.inputs_fp,
            targets=empty if activations is None else activations.original,
            schemes=schemes,
            second_moments=moments,
            scale_dtype=self.job.plan.scale_dtype,
            device=self.job.model.device,
            seed=derived_seed(self.job.seed, index),
            micro_batch=self.job.plan.micro_batch,
            tick=tick,
            tune=self.tuner.tune,
            folds=self.job.model.layout.folds,
            log=self.job.reporter.log,
            sum_=self.job.processes.sum_,
            quantize=_quantize_block,
            absmax=absmax,
            fisher=fisher,
        )

    def _advance_original(
        self, index: int, block: nn.Module, only: Activations | None, cache: CacheWatch | None = None
    ) -> None:
        if only is not None:
            with self.job.clock.during(self._stage_of(only)):
                only.advance_original(index, block, cache)

    def _advance_reference(self, index: int, block: nn.Module) -> None:
        """Before anything changes the block's weights."""
        activations, prefix = self.evaluation, self.job.model.layout.block(index)
        if activations is None or activations.reference is None:
            return
        schemes = {name: self.job.schemes[f"{prefix}.{name}"] for name in self._quantized_linears(index)}
        with (
            self.job.clock.during(Stage.EVALUATE),
            rounded(
                self.job.model.block_linears(index),
                schemes,
                self.job.plan.scale_dtype,
                self.job.model.joined(index),
            ),
        ):
            activations.advance_reference(index, block)

    def _advance_quantized(self, index: int, block: nn.Module) -> None:
        for activations in (self.calibration, self.evaluation):
            if activations is not None:
                with self.job.clock.during(self._stage_of(activations)):
                    activations.advance_quantized(index, block)

    def _stage_of(self, activations: Activations) -> Stage:
        return Stage.EVALUATE if activations is self.evaluation else Stage.QUANTIZE

    def _put(self, index: int, result: BlockResult, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts what the results stand for, and what changed with them, into the block.

        How far the weights are from the original ones, by linear; scales that moved are taken back for that.
        """
        errors = {}
        for name, linear in result.linears.items():
            original = self.job.model.block_linears(index)[name].weight
            value = linear.to(self.job.model.device).dequantize()
            errors[name] = error_sums(linear.scaling.undo(value), original, moments.get(name))
            self._replace(index, f"{name}.weight", value)
        for name, value in result.parameters.items():
            self._replace(index, name, value.to(self.job.model.device))
        return errors

    def _replace(self, index: int, parameter: str, value: Tensor) -> None:
        owner, _, leaf = parameter.rpartition(".")
        setattr(self.job.model.blocks[index].get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _quantize_block(task: BlockTask, spec: WeightSpec) -> BlockResult:
    return method_of(spec).quantize_block(task, spec)


def _no_forward(block: Callable[..., Any], hidden: Tensor) -> Tensor:
    raise TypeError(f"{block} is given to a method without inputs: {tuple(hidden.shape)}")
