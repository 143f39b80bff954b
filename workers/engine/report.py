"""The report of a job: what its stages found, what its checkpoints take, and what it cost."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod

from bitwright.report import (
    BaseJobReport,
    BlockReport,
    Figures,
    LinearReport,
    ModelReport,
    PeakMemory,
    Report,
    ScaleReport,
    SizeReport,
    StoredParts,
)
from workers.engine.clock import peak_memory
from workers.engine.finetune.stage import Finetuned
from workers.engine.job import Job
from workers.engine.model.checkpoint import StoredTensor
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import plan_report
from workers.engine.quantize.finished_blocks import FinishedBlocks
from workers.engine.shipped_quality import Evaluated
from workers.engine.text.sequences import source_label
from workers.formats.cards.identity import Identity
from workers.numerics.quantized import StoredBits


@dataclass(frozen=True)
class Findings:
    """What the report tells beside sizes and times."""

    blocks: tuple[BlockReport, ...]
    scales: ScaleReport | None
    evaluated: Evaluated | None
    finetuned: Finetuned | None = None
    reference: Figures | None = None
    head: LinearReport | None = None


def report_of(job: Job, state: FinishedBlocks, found: Findings, size: SizeReport) -> Report:
    """Everything but what the export tells: its adapters, and the warnings that come with it."""
    request, sequences = job.order.request, job.texts.calibration
    resumed = min(state.resumed, len(found.blocks))
    return Report(
        version=version("bitwright"),
        method=request.quantization.method,
        seed=request.seed,
        device=job.order.device,
        plan=plan_report(job.plan),
        model=ModelReport(
            source=source_label(request.model),
            kind=request.model.source,
            revision=job.order.model_revision,
            architecture=type(job.model.model).__name__,
            dtype=job.plan.dtype,
            parameters=_parameters(job.model),
        ),
        calibration=None if sequences is None else sequences.report(),
        quality=None if found.evaluated is None else found.evaluated.quality,
        shipped=() if found.evaluated is None else found.evaluated.shipped,
        round_to_nearest=found.reference,
        head=found.head,
        base_job=_base_job_report(job, len(found.blocks)),
        blocks=found.blocks,
        allocation=job.prepared.report,
        scales=found.scales,
        finetuning=None if found.finetuned is None else found.finetuned.report,
        size=size,
        seconds=job.clock.seconds(),
        peak_memory=_peak_memory(job, found),
        blocks_computed=len(found.blocks) - resumed if job.base_job is None else 0,
        blocks_resumed=resumed,
        warnings=tuple(job.reporter.warnings),
    )


def identity_of(job: Job, found: Findings) -> Identity:
    """What the job makes, for files that say so before there is a report."""
    request, model = job.order.request, source_label(job.order.request.model)
    trained = found.finetuned is not None and request.adapter is not None
    return Identity(
        version=version("bitwright"),
        model=model,
        model_id=model if request.model.source == "hub" else None,
        revision=job.order.model_revision,
        method=request.quantization.method,
        adapter=request.adapter.kind if trained and request.adapter is not None else None,
        folded=trained and request.merge == "quantized",
        finetuning=None if found.finetuned is None else found.finetuned.report,
        earlier=() if job.base_job is None else job.base_job.training,
    )


def _base_job_report(job: Job, blocks: int) -> BaseJobReport | None:
    base_job, job_id = job.base_job, job.order.request.base_job
    if base_job is None or job_id is None:
        return None
    return BaseJobReport(
        job_id=job_id, blocks_adopted=blocks, adapter_continued=base_job.continues, training=base_job.training
    )


def _peak_memory(job: Job, found: Findings) -> PeakMemory:
    """Of the whole job: the stage that finetunes counts anew."""
    peak = peak_memory(job.model.device)
    before = None if found.finetuned is None else found.finetuned.peak_before
    if before is None or peak.device_bytes is None:
        return peak
    return peak.model_copy(update={"device_bytes": max(before, peak.device_bytes)})


def size_of(job: Job, stored: StoredBits, weights: int) -> SizeReport:
    """What the job's linears take as they ship.

    stored    bits of all quantized linears, by what they hold
    weights   how many weights they are
    """
    model, count = job.model, max(1, weights)
    before = sum(tensor.size for tensor in _tensors(model))
    quantized = sum(model.checkpoint.tensors[model.sources[f"{name}.weight"]].size for name in job.schemes)
    after = before - quantized + stored.total // 8
    return SizeReport(
        bytes_original=before,
        bytes_quantized=after,
        quantized_weights=weights,
        bits_per_weight=stored.total / count,
        bits_per_weight_model=after * 8 / _parameters(model),
        parts=StoredParts(**{name: bits / count for name, bits in asdict(stored).items()}),
    )


def _tensors(model: StreamedModel) -> list[StoredTensor]:
    """What the checkpoint holds of the model's parameters, each once.

    Never the modules: stages put others in their place, and parameters without memory.
    """
    return [model.checkpoint.tensors[name] for name in sorted(set(model.sources.values()))]


def _parameters(model: StreamedModel) -> int:
    return sum(prod(tensor.shape) for tensor in _tensors(model))
