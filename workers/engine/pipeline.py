"""A job's computation from order to checkpoints: load, calibrate, block by block, evaluate, export, report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from app.domain.errors import InternalError
from app.domain.events import AttemptOrder, ResultLine, Stage
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from app.domain.report import (
    BaseReport,
    BlockReport,
    ModelReport,
    PeakMemory,
    Quality,
    Report,
    ScaleReport,
    SizeReport,
    StoredParts,
)
from workers.adapters.attaching import Attach
from workers.engine.block_pass import BlockPass
from workers.engine.blocks import StreamedModel
from workers.engine.calibration import load_tokenizer, source_label
from workers.engine.checkpoint import Checkpoint
from workers.engine.clock import StageClock, peak_memory
from workers.engine.earlier_result import EarlierResult
from workers.engine.evaluation import measure
from workers.engine.export import Export, TrainedAdapters
from workers.engine.finetuning_stage import (
    Finetuned,
    FinetuningStage,
    run_finetuning,
)
from workers.engine.generated_text import Generation
from workers.engine.plan import (
    Plan,
    make_plan,
    open_device,
    plan_report,
    plan_schemes,
    reproducible,
    scale_dtype,
)
from workers.engine.preparation import Preparation, Prepared, digest, is_needed
from workers.engine.ranks import Ranks, joined
from workers.engine.registry import METHODS
from workers.engine.reporter import Reporter
from workers.engine.resume import ResumeState, code_version, fingerprint
from workers.engine.scale_stage import run_scale_stage
from workers.engine.streams import Stream
from workers.engine.texts import Texts, read_texts
from workers.engine.tuning import Tuner
from workers.engine.warm_up import compiling
from workers.formats.writer import check_model
from workers.numerics.quantized import StoredBits

CODES_DEPEND_ON = {"base_job", "quantization", "calibration", "seed"}
"""Fields of a request that decide the codes."""


def run(order: AttemptOrder, workspace: Path, reporter: Reporter) -> ResultLine:
    """Does what `order` says. Checkpoints go to `workspace`/output/<format>, finished blocks to `workspace`/state.

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but tied to the embeddings.
        FormatCannotHold: a format of the request cannot hold this model.
    """
    with _opened(order, workspace, reporter, rank=0) as opened:
        job, state, found = _with_ranks(opened, 0)
        job.clock.enter(Stage.EXPORT)
        return _export(job, state, found)


def assist(order: AttemptOrder, workspace: Path, rank: int) -> None:
    """What every further rank of an order does while the first is in `run`: the same up to the export, mute.

    Raises what `run` raises, and where it does, unless only this rank meets the cause.
    """
    with _opened(order, workspace, Reporter(lambda _: None), rank) as job:
        _with_ranks(job, rank)


@contextmanager
def _opened(order: AttemptOrder, workspace: Path, reporter: Reporter, rank: int) -> Iterator["_Job"]:
    """The job with its model, texts and plan, on a rank's device."""
    clock = StageClock(Stage.LOAD)
    device = open_device(order, rank)
    with reproducible(device):
        reporter.progress(Stage.LOAD, 0, 1, "models")
        checkpoint = Checkpoint.open(Path(order.model_path))
        model = StreamedModel.open(checkpoint, device)
        schemes = plan_schemes(model, order.request.quantization)
        inputs = {name: linear.in_features for name, linear in model.linears().items() if name in schemes}
        check_model(order.request.formats, checkpoint, checkpoint.config["model_type"], inputs)
        earlier = _earlier(order, model, set(schemes))
        schemes = schemes if earlier is None else earlier.schemes
        tokenizer = load_tokenizer(Path(order.model_path))
        reporter.progress(Stage.LOAD, 1, 1, "models")
        clock.enter(Stage.CALIBRATE)
        compiled = schemes if earlier is None else {}
        with compiling(model, compiled, order.request.quantization, scale_dtype(order.request.formats, model.dtype)):
            texts = read_texts(order, model, reporter, _generation(order, workspace, model, tokenizer, reporter, rank))
        plan = make_plan(order, model, texts.streams(order.request.quantization.needs_original_inputs()))
        reporter.log(
            "activations_placed", place=plan.activations, bytes=plan.activation_bytes, budget=plan.activation_budget
        )
        yield _Job(order, workspace, reporter, clock, model, schemes, texts, plan, Prepared(), earlier)


def _earlier(order: AttemptOrder, model: StreamedModel, quantized: set[str]) -> EarlierResult | None:
    if order.request.base_job is None:
        return None
    if order.base_path is None:
        raise InternalError("the order has no folder of the job that this one starts from", field="base_job")
    earlier = EarlierResult.open(Path(order.base_path), model, quantized)
    earlier.demand_held(order.request.formats)
    return earlier


@dataclass(frozen=True)
class Findings:
    """What the report tells beside sizes and times."""

    blocks: tuple[BlockReport, ...]
    scales: ScaleReport | None
    quality: Quality | None
    finetuned: Finetuned | None = None


@dataclass(frozen=True)
class _Job:
    order: AttemptOrder
    workspace: Path
    reporter: Reporter
    clock: StageClock
    model: StreamedModel
    schemes: dict[str, Scheme]
    texts: Texts
    plan: Plan
    prepared: Prepared
    earlier: EarlierResult | None = None


def _generation(
    order: AttemptOrder,
    workspace: Path,
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    rank: int,
) -> Generation:
    wanted = order.request.calibration.num_samples
    return Generation(
        checkpoint=model.checkpoint,
        tokenizer=tokenizer,
        device=model.device,
        kept=workspace / "generated.safetensors",
        leads=rank == 0,
        tick=lambda done: reporter.progress(Stage.CALIBRATE, done, wanted, "windows"),
    )


def _with_ranks(job: _Job, rank: int) -> tuple[_Job, ResumeState, Findings]:
    with joined(Ranks(rank, job.order.world_size), job.order.rendezvous, job.model.device) as ranks:
        job = _prepared(job, ranks)
        return job, *_run_blocks(job, ranks)


def _prepared(job: _Job, ranks: Ranks) -> _Job:
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


def _run_blocks(job: _Job, ranks: Ranks) -> tuple[ResumeState, Findings]:
    """All that the ranks do together."""
    texts, model = job.texts, job.model
    keep_inputs = job.order.request.quantization.needs_original_inputs()
    observed = texts.calibration if METHODS[job.order.request.quantization.method].needs_inputs else None
    with model.loaded(model.layout.embeddings):
        calibration, evaluation = (
            None if windows is None else Stream(model, ranks.share(windows.ids), job.plan, keep_inputs=keep)
            for windows, keep in ((observed, keep_inputs), (texts.evaluation, False))
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
    return state, Findings(reports, scales, quality, finetuned)


def _finetune(
    job: _Job, state: ResumeState, evaluation: Stream | None, head: torch.Tensor | None, ranks: Ranks
) -> Finetuned | None:
    request, texts = job.order.request, job.texts.finetuning
    part, adapter = request.finetune, request.adapter
    if part is None or adapter is None or texts is None:
        return None
    job.clock.enter(Stage.FINETUNE)
    linears = job.model.linears()
    names = [name for name in job.schemes if name != job.model.layout.head]
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in names}
    return run_finetuning(
        FinetuningStage(
            model=job.model,
            part=part,
            texts=texts,
            attach=Attach(adapter, shapes, {} if job.earlier is None else job.earlier.adapters),
            names=frozenset(names),
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


def _fingerprint(job: _Job) -> str:
    request = job.order.request.model_dump(mode="json", include=CODES_DEPEND_ON)
    windows = job.texts.calibration
    return fingerprint(
        {
            "request": request,
            "model": job.model.checkpoint.digest(job.order.model_revision),
            "calibration": None if windows is None else windows.sha256,
            "code": code_version(),
            "plan": job.plan.decides_codes(),
            "prepared": digest(job.prepared),
        }
    )


def _evaluate(job: _Job, stream: Stream, head: torch.Tensor | None, ranks: Ranks) -> Quality:
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


def _export(job: _Job, state: ResumeState, found: Findings) -> ResultLine:
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
    )
    exported = export.write(state)
    report = _report(job, state, found, _size(job, exported.stored, exported.weights))
    report = report.model_copy(update={"adapter": exported.adapter, "warnings": tuple(job.reporter.warnings)})
    checkpoints = export.describe(exported, report)
    job.model.checkpoint.close()
    return ResultLine(report=report, checkpoints=checkpoints)


def _size(job: _Job, stored: StoredBits, weights: int) -> SizeReport:
    checkpoint, count = job.model.checkpoint, max(1, weights)
    quantized = sum(checkpoint.tensors[job.model.sources[f"{name}.weight"]].size for name in job.schemes)
    after = checkpoint.size - quantized + stored.total // 8
    return SizeReport(
        bytes_original=checkpoint.size,
        bytes_quantized=after,
        quantized_weights=weights,
        bits_per_weight=stored.total / count,
        bits_per_weight_model=after * 8 / _parameters(job.model),
        parts=StoredParts(**{name: bits / count for name, bits in asdict(stored).items()}),
    )


def _parameters(model: StreamedModel) -> int:
    return sum(parameter.numel() for name, parameter in model.model.named_parameters() if name in model.sources)


def _report(job: _Job, state: ResumeState, found: Findings, size: SizeReport) -> Report:
    request, windows = job.order.request, job.texts.calibration
    resumed = min(state.resumed, len(found.blocks))
    return Report(
        version=version("bitwright"),
        method=request.quantization.method,
        seed=request.seed,
        device=job.order.device,
        plan=plan_report(job.plan),
        model=ModelReport(
            source=source_label(request.model),
            revision=job.order.model_revision,
            architecture=type(job.model.model).__name__,
            dtype=job.plan.dtype,
            parameters=_parameters(job.model),
        ),
        calibration=None if windows is None else windows.report(),
        quality=found.quality,
        base=_base_report(job, len(found.blocks)),
        blocks=found.blocks,
        allocation=job.prepared.report,
        scales=found.scales,
        finetuning=None if found.finetuned is None else found.finetuned.report,
        size=size,
        seconds=job.clock.seconds(),
        peak_memory=_peak_memory(job, found),
        blocks_computed=len(found.blocks) - resumed if job.earlier is None else 0,
        blocks_resumed=resumed,
        warnings=tuple(job.reporter.warnings),
    )


def _base_report(job: _Job, blocks: int) -> BaseReport | None:
    earlier, job_id = job.earlier, job.order.request.base_job
    if earlier is None or job_id is None:
        return None
    return BaseReport(job_id=job_id, blocks_adopted=blocks, adapter_continued=earlier.continues)


def _peak_memory(job: _Job, found: Findings) -> PeakMemory:
    """Of the whole job: the stage that finetunes counts anew."""
    peak = peak_memory(job.model.device)
    before = None if found.finetuned is None else found.finetuned.peak_before
    if before is None or peak.device_bytes is None:
        return peak
    return peak.model_copy(update={"device_bytes": max(before, peak.device_bytes)})
