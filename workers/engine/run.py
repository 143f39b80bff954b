"""A job's computation from order to checkpoints: open, prepare, block by block, finetune, evaluate, export."""

from dataclasses import replace
from pathlib import Path

import torch

from app.domain.attempt_lines import ResultLine
from app.domain.format_rules import rounds_offsets, stored_formats
from app.domain.formats import ExportFormat
from app.domain.methods import Form
from app.domain.request.combination_rules import result_forms
from app.domain.request.job_request import JobRequest
from bitwright.events import Stage
from bitwright.report import Figures, Quality
from workers.adapters.attaching import Attach
from workers.disk.orders import AttemptOrder
from workers.engine.device.process_group import ProcessGroup, joined
from workers.engine.evaluate import measure
from workers.engine.export import Export
from workers.engine.finetune.stage import Finetuned, FinetuningStage, run_finetuning, shipped_loss
from workers.engine.fingerprint import code_version, fingerprint, library_versions
from workers.engine.job import Job, open_job
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.block_pass import BlockPass
from workers.engine.quantize.block_report import report_of_head
from workers.engine.quantize.finished_blocks import FinishedBlocks
from workers.engine.quantize.preparation import Preparation, digest
from workers.engine.quantize.reference import measure_reference
from workers.engine.quantize.registry import METHODS, is_needed
from workers.engine.report import Findings, identity_of, report_of, size_of
from workers.engine.reporter import Reporter
from workers.engine.scales.stage import run_scale_stage
from workers.engine.shipped import Key, Numbers, Replay, Shipment, TrainedAdapters, offset_dtype, shipments
from workers.engine.shipped_quality import Evaluated, Judge, differences, evaluate
from workers.engine.tune.tuner import Tuner

CODES_DEPEND_ON = {"base_job", "quantization", "calibration", "seed"}
"""Fields of a request that decide the codes."""


def run(order: AttemptOrder, workspace: Path, reporter: Reporter) -> ResultLine:
    """Does what `order` says. Checkpoints go to `workspace`/output/<format>, finished blocks to `workspace`/state.

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but tied to the embeddings.
        FormatCannotHold: a format of the request cannot hold this model.
    """
    with open_job(order, workspace, reporter, rank=0) as loaded:
        job, state, found = _with_processes(loaded, 0)
        job.clock.enter(Stage.EXPORT)
        return _export(job, state, found)


def assist(order: AttemptOrder, workspace: Path, rank: int) -> None:
    """What every further rank of an order does while the first is in `run`: the same up to the export, mute.

    Raises what `run` raises, and where it does, unless only this rank meets the cause.
    """
    with open_job(order, workspace, Reporter(lambda _: None), rank) as job:
        _with_processes(job, rank)


def _with_processes(job: Job, rank: int) -> tuple[Job, FinishedBlocks, Findings]:
    with joined(ProcessGroup(rank, job.order.world_size), job.order.rendezvous, job.model.device) as processes:
        job = _prepared(job, processes)
        return job, *_run_blocks(job, processes)


def _prepared(job: Job, processes: ProcessGroup) -> Job:
    """The job with what its spec asks to know of the whole model before the first block."""
    request, sequences = job.order.request, job.texts.calibration
    if sequences is None or not is_needed(request.quantization):
        return job

    def tick(share: float) -> None:
        total = len(job.model.blocks)
        job.reporter.progress(Stage.CALIBRATE, share * total, total, "blocks")

    preparation = Preparation(
        model=job.model,
        spec=request.quantization,
        plan=job.plan,
        seed=request.seed,
        ids=processes.share(sequences.ids),
        folder=job.workspace / "state",
        fingerprint=_fingerprint(job),
        tick=tick,
        processes=processes,
    )
    prepared = preparation.run()
    return replace(job, prepared=prepared, schemes=job.schemes | dict(prepared.schemes))


def _run_blocks(job: Job, processes: ProcessGroup) -> tuple[FinishedBlocks, Findings]:
    """All that the ranks do together."""
    texts, model = job.texts, job.model
    keep_inputs = job.order.request.quantization.needs_original_inputs()
    observed = texts.calibration if METHODS[job.order.request.quantization.method].needs_inputs else None
    with model.loaded(model.layout.embeddings):
        calibration, evaluation = (
            None
            if sequences is None
            else Activations(model, processes.share(sequences.ids), job.plan, keep_inputs=keep, reference=reference)
            for sequences, keep, reference in (
                (observed, keep_inputs, False),
                (texts.evaluation, False, job.reference),
            )
        )
    state = FinishedBlocks(job.workspace / "state", _fingerprint(job), processes)
    if state.resumed:
        job.reporter.log("blocks_resumed", blocks=state.resumed)
    job.clock.enter(Stage.QUANTIZE)
    blocks = BlockPass(
        model=model,
        spec=job.order.request.quantization,
        schemes=job.schemes,
        plan=job.plan,
        seed=job.order.request.seed,
        calibration=calibration,
        evaluation=evaluation,
        prepared=job.prepared,
        tuner=Tuner(job.reporter.log, processes),
        state=state,
        clock=job.clock,
        reporter=job.reporter,
        processes=processes,
        base_job=job.base_job,
    )
    reports = blocks.run()
    state.settle()
    head = blocks.quantize_head()
    if head is not None and job.base_job is None:
        job.reporter.warning("head_rounded", f"{model.layout.head} is rounded to nearest: only blocks are tuned")
    scales = run_scale_stage(blocks, head)
    blocks.tuner.release()
    del calibration, blocks
    finetuned = _finetune(job, state, head, processes)
    job.clock.enter(Stage.EVALUATE)
    evaluated = None if evaluation is None else _evaluate(job, state, evaluation, head, finetuned, processes)
    reference = None if evaluation is None else _reference(job, evaluation, head, processes)
    head_report = None if head is None else report_of_head(model, state.load(len(model.blocks)))
    return state, Findings(reports, scales, evaluated, finetuned, reference, head_report)


def _finetune(job: Job, state: FinishedBlocks, head: torch.Tensor | None, processes: ProcessGroup) -> Finetuned | None:
    request, texts = job.order.request, job.texts.finetuning
    part, adapter = request.finetune, request.adapter
    if part is None or adapter is None or texts is None:
        return None
    job.clock.enter(Stage.FINETUNE)
    stage = FinetuningStage(
        model=job.model,
        part=part,
        texts=texts,
        attach=Attach(adapter, {} if job.base_job is None else job.base_job.adapters),
        names=frozenset(job.schemes) - {job.model.layout.head},
        state=state,
        folder=job.workspace / "state",
        identity={"codes": _fingerprint(job), "adapter": request.model_dump(mode="json", include={"adapter"})},
        head=head,
        seed=request.seed,
        divisor=job.order.micro_batch_divisor,
        reporter=job.reporter,
        processes=processes,
    )
    finetuned = run_finetuning(stage)
    trained = _trained_adapters(job, finetuned)
    if trained is None or _ways(job, trained)[0].numbers is not Numbers.WHOLE:
        return finetuned
    loss = shipped_loss(stage, finetuned.report, lambda index: trained.results(state.load(index)))
    return replace(finetuned, report=finetuned.report.model_copy(update={"loss_shipped": loss}))


def _fingerprint(job: Job) -> str:
    request = job.order.request.model_dump(mode="json", include=CODES_DEPEND_ON)
    sequences = job.texts.calibration
    return fingerprint(
        {
            "request": request,
            "model": job.model.checkpoint.digest(job.order.model_revision),
            "calibration": None if sequences is None else sequences.sha256,
            "code": code_version(),
            "libraries": library_versions(),
            "plan": job.plan.decides_codes(),
            "prepared": digest(job.prepared),
        }
    )


def _evaluate(
    job: Job,
    state: FinishedBlocks,
    stream: Activations,
    head: torch.Tensor | None,
    finetuned: Finetuned | None,
    processes: ProcessGroup,
) -> Evaluated:
    """Quality of everything that ships, with the numbers that `_export` stores."""
    sequences, request = job.texts.evaluation, job.order.request
    assert sequences is not None  # noqa: S101 - for the type checker; the stream was made of them

    def judge(head: torch.Tensor | None, number: int, count: int) -> Quality:
        def tick(share: float) -> None:
            total = len(sequences.ids) * count
            job.reporter.progress(Stage.EVALUATE, (number + share) / count * total, total, "windows")

        return measure(
            job.model, stream.original, stream.quantized, sequences, quantized_head=head, tick=tick, processes=processes
        )

    trained = _trained_adapters(job, finetuned)
    found = evaluate(
        _ways(job, trained),
        Replay(job.model, state, trained),
        stream,
        Judge(head, judge),
        merged=request.merge is not None,
        streamed=_streamed(job, trained),
    )
    for name in ("perplexity_original", "perplexity", "kl_divergence", "top1_agreement"):
        job.reporter.metric(name, getattr(found.quality, name))
    for code, message in differences(found, None if finetuned is None else finetuned.report, _merging(request)):
        job.reporter.warning(code, message)
    return found


def _ways(job: Job, trained: TrainedAdapters | None) -> list[Shipment]:
    request = job.order.request
    return shipments(
        request.formats,
        factors=Form.LOW_RANK in result_forms(request.quantization, request.adapter, request.merge),
        trained=trained is not None,
        merge=request.merge,
        rounding=_rounding_formats(job),
    )


def _streamed(job: Job, trained: TrainedAdapters | None) -> Key | None:
    """What the quantized stream has gone through when all blocks and scales are done."""
    if trained is None:
        return Numbers.WHOLE, None
    # Weights alone, unless a method or an earlier job began with factors beside them.
    began_with_factors = job.base_job is not None or Form.LOW_RANK in job.order.request.quantization.forms()
    return None if began_with_factors else (Numbers.BASE, None)


def _rounding_formats(job: Job) -> tuple[ExportFormat, ...]:
    """The job's formats in which zero points become fp16 offsets, if it has zero points."""
    request, schemes = job.order.request, dict(job.schemes)
    rounding = rounds_offsets(request.formats)
    if request.merge == "quantized":
        if request.round_offset:
            return rounding
        # Offsets of all formats are fp16 then; a head has no adapter.
        schemes = {name: scheme for name, scheme in schemes.items() if name == job.model.layout.head}
    return rounding if any(not scheme.symmetric for scheme in schemes.values()) else ()


def _merging(request: JobRequest) -> str:
    """What the request's merge does, for a message."""
    if request.merge == "16bit":
        return "adding the adapter to rounded weights"
    return "rounding offsets to integer zero points" if request.round_offset else "folding the adapter into offsets"


def _trained_adapters(job: Job, finetuned: Finetuned | None) -> TrainedAdapters | None:
    request = job.order.request
    if finetuned is None or request.adapter is None:
        return None
    dtype = offset_dtype(request.formats)
    return TrainedAdapters(request.adapter, finetuned.adapters, request.merge, request.round_offset, dtype)


def _reference(job: Job, stream: Activations, head: torch.Tensor | None, processes: ProcessGroup) -> Figures | None:
    sequences = job.texts.evaluation
    found = None if sequences is None else measure_reference(job.model, stream, sequences, head, processes)
    if found is not None:
        job.reporter.metric("perplexity_round_to_nearest", found.perplexity)
    return found


def _export(job: Job, state: FinishedBlocks, found: Findings) -> ResultLine:
    """Writes every format from the durable blocks, and the same report into each."""
    request, evaluated = job.order.request, found.evaluated
    export = Export(
        model=job.model,
        folder=job.workspace / "output",
        formats=stored_formats(request.formats),
        ignored=tuple(name for name in job.model.linears() if name not in job.schemes),
        trained=_trained_adapters(job, found.finetuned),
        reporter=job.reporter,
        identity=identity_of(job, found),
    )
    exported = export.write(state)
    report = report_of(job, state, found, size_of(job, exported.stored, exported.weights))
    adapter = exported.adapter
    if adapter is not None and evaluated is not None:
        adapter = adapter.model_copy(update={"before_merge": evaluated.before_merge})
    report = report.model_copy(update={"adapter": adapter, "warnings": tuple(job.reporter.warnings)})
    checkpoints = export.describe(exported, report)
    job.model.checkpoint.close()
    return ResultLine(report=report, checkpoints=checkpoints)
