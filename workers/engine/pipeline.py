"""A job's computation from order to checkpoints: open, prepare, block by block, finetune, evaluate, export."""

from dataclasses import replace
from pathlib import Path

import torch

from app.domain.events import AttemptOrder, ResultLine, Stage
from app.domain.formats import ExportFormat
from app.domain.report import Quality, Reference
from workers.adapters.attaching import Attach
from workers.engine.block_pass import BlockPass
from workers.engine.block_report import report_of_head
from workers.engine.evaluation import measure
from workers.engine.export import Export, TrainedAdapters
from workers.engine.finetuning_stage import Finetuned, FinetuningStage, run_finetuning
from workers.engine.job_report import Findings, identity_of, report_of, size_of
from workers.engine.opened_job import OpenedJob, opened
from workers.engine.preparation import Preparation, digest, is_needed
from workers.engine.ranks import Ranks, joined
from workers.engine.reference import measure_reference
from workers.engine.registry import METHODS
from workers.engine.reporter import Reporter
from workers.engine.resume import ResumeState, code_version, fingerprint, library_versions
from workers.engine.scale_stage import run_scale_stage
from workers.engine.streams import Stream
from workers.engine.tuning import Tuner

CODES_DEPEND_ON = {"base_job", "quantization", "calibration", "seed"}
"""Fields of a request that decide the codes."""


def run(order: AttemptOrder, workspace: Path, reporter: Reporter) -> ResultLine:
    """Does what `order` says. Checkpoints go to `workspace`/output/<format>, finished blocks to `workspace`/state.

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but tied to the embeddings.
        FormatCannotHold: a format of the request cannot hold this model.
    """
    with opened(order, workspace, reporter, rank=0) as loaded:
        job, state, found = _with_ranks(loaded, 0)
        job.clock.enter(Stage.EXPORT)
        return _export(job, state, found)


def assist(order: AttemptOrder, workspace: Path, rank: int) -> None:
    """What every further rank of an order does while the first is in `run`: the same up to the export, mute.

    Raises what `run` raises, and where it does, unless only this rank meets the cause.
    """
    with opened(order, workspace, Reporter(lambda _: None), rank) as job:
        _with_ranks(job, rank)


def _with_ranks(job: OpenedJob, rank: int) -> tuple[OpenedJob, ResumeState, Findings]:
    with joined(Ranks(rank, job.order.world_size), job.order.rendezvous, job.model.device) as ranks:
        job = _prepared(job, ranks)
        return job, *_run_blocks(job, ranks)


def _prepared(job: OpenedJob, ranks: Ranks) -> OpenedJob:
    """The job with what its spec asks to know of the whole model before the first block."""
    request, windows = job.order.request, job.texts.calibration
    if windows is None or not is_needed(request.quantization):
        return job

    def tick(share: float) -> None:
        total = len(job.model.blocks)
        job.reporter.progress(Stage.CALIBRATE, share * total, total, "blocks")

    preparation = Preparation(
        model=job.model,
        spec=request.quantization,
        plan=job.plan,
        seed=request.seed,
        ids=ranks.share(windows.ids),
        folder=job.workspace / "state",
        fingerprint=_fingerprint(job),
        tick=tick,
        ranks=ranks,
    )
    prepared = preparation.run()
    return replace(job, prepared=prepared, schemes=job.schemes | dict(prepared.schemes))


def _run_blocks(job: OpenedJob, ranks: Ranks) -> tuple[ResumeState, Findings]:
    """All that the ranks do together."""
    texts, model = job.texts, job.model
    keep_inputs = job.order.request.quantization.needs_original_inputs()
    observed = texts.calibration if METHODS[job.order.request.quantization.method].needs_inputs else None
    with model.loaded(model.layout.embeddings):
        calibration, evaluation = (
            None
            if windows is None
            else Stream(model, ranks.share(windows.ids), job.plan, keep_inputs=keep, reference=reference)
            for windows, keep, reference in (
                (observed, keep_inputs, False),
                (texts.evaluation, False, job.reference),
            )
        )
    state = ResumeState(job.workspace / "state", _fingerprint(job), ranks)
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
        tuner=Tuner(job.reporter.log, ranks),
        state=state,
        clock=job.clock,
        reporter=job.reporter,
        ranks=ranks,
        earlier=job.earlier,
    )
    reports = blocks.run()
    state.settle()
    head = blocks.quantize_head()
    if head is not None and job.earlier is None:
        job.reporter.warning("head_rounded", f"{model.layout.head} is rounded to nearest: only blocks are tuned")
    scales = run_scale_stage(blocks, head)
    blocks.tuner.release()
    del calibration, blocks
    finetuned = _finetune(job, state, evaluation, head, ranks)
    job.clock.enter(Stage.EVALUATE)
    quality = None if evaluation is None else _evaluate(job, evaluation, head, ranks)
    reference = None if evaluation is None else _reference(job, evaluation, head, ranks)
    head_report = None if head is None else report_of_head(model, state.load(len(model.blocks)))
    return state, Findings(reports, scales, quality, finetuned, reference, head_report)


def _finetune(
    job: OpenedJob, state: ResumeState, evaluation: Stream | None, head: torch.Tensor | None, ranks: Ranks
) -> Finetuned | None:
    request, texts = job.order.request, job.texts.finetuning
    part, adapter = request.finetune, request.adapter
    if part is None or adapter is None or texts is None:
        return None
    job.clock.enter(Stage.FINETUNE)
    return run_finetuning(
        FinetuningStage(
            model=job.model,
            part=part,
            texts=texts,
            attach=Attach(adapter, {} if job.earlier is None else job.earlier.adapters),
            names=frozenset(job.schemes) - {job.model.layout.head},
            state=state,
            folder=job.workspace / "state",
            identity={"codes": _fingerprint(job), "adapter": request.model_dump(mode="json", include={"adapter"})},
            head=head,
            evaluation=evaluation,
            seed=request.seed,
            divisor=job.order.micro_batch_divisor,
            reporter=job.reporter,
            ranks=ranks,
        )
    )


def _fingerprint(job: OpenedJob) -> str:
    request = job.order.request.model_dump(mode="json", include=CODES_DEPEND_ON)
    windows = job.texts.calibration
    return fingerprint(
        {
            "request": request,
            "model": job.model.checkpoint.digest(job.order.model_revision),
            "calibration": None if windows is None else windows.sha256,
            "code": code_version(),
            "libraries": library_versions(),
            "plan": job.plan.decides_codes(),
            "prepared": digest(job.prepared),
        }
    )


def _evaluate(job: OpenedJob, stream: Stream, head: torch.Tensor | None, ranks: Ranks) -> Quality:
    windows = job.texts.evaluation
    assert windows is not None  # noqa: S101 - for the type checker; the stream was made of them

    def tick(share: float) -> None:
        job.reporter.progress(Stage.EVALUATE, share * len(windows.ids), len(windows.ids), "windows")

    quality = measure(
        job.model, stream.original, stream.quantized, windows, quantized_head=head, tick=tick, ranks=ranks
    )
    for name in ("perplexity_original", "perplexity", "kl_divergence", "top1_agreement"):
        job.reporter.metric(name, getattr(quality, name))
    return quality


def _reference(job: OpenedJob, stream: Stream, head: torch.Tensor | None, ranks: Ranks) -> Reference | None:
    windows = job.texts.evaluation
    found = None if windows is None else measure_reference(job.model, stream, windows, head, ranks)
    if found is not None:
        job.reporter.metric("perplexity_round_to_nearest", found.perplexity)
    return found


def _export(job: OpenedJob, state: ResumeState, found: Findings) -> ResultLine:
    """Writes every format from the durable blocks, and the same report into each."""
    request, finetuned = job.order.request, found.finetuned
    trained = None
    if finetuned is not None and request.adapter is not None:
        trained = TrainedAdapters(request.adapter, finetuned.adapters, request.merge, request.round_offset)
    export = Export(
        model=job.model,
        folder=job.workspace / "output",
        formats=tuple(dict.fromkeys([*request.formats, ExportFormat.NATIVE])),
        ignored=tuple(name for name in job.model.linears() if name not in job.schemes),
        trained=trained,
        reporter=job.reporter,
        identity=identity_of(job, found),
    )
    exported = export.write(state)
    report = report_of(job, state, found, size_of(job, exported.stored, exported.weights))
    report = report.model_copy(update={"adapter": exported.adapter, "warnings": tuple(job.reporter.warnings)})
    checkpoints = export.describe(exported, report)
    job.model.checkpoint.close()
    return ResultLine(report=report, checkpoints=checkpoints)
