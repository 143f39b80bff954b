"""The report of a job: results of its stages, size of its checkpoints, time and memory."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod

from app.domain.methods.spec_words import in_words
from bitwright.report import (
    BaseJobReport,
    BlockReport,
    LinearReport,
    LoadReport,
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
from workers.engine.shipped_quality import Evaluated
from workers.engine.text.sequences import source_label
from workers.formats.cards.identity import Identity
from workers.numerics.quantized import StoredBits


@dataclass(frozen=True)
class Results:
    """Results of a job's stages, from which the report is made."""

    blocks: tuple[BlockReport, ...]
    embeddings: LinearReport | None
    head: LinearReport | None
    scales: ScaleReport | None
    finetuned: Finetuned | None
    evaluated: Evaluated | None
    loads: tuple[LoadReport, ...] = ()


def report_of(job: Job, results: Results, size: SizeReport) -> Report:
    """Everything but what the export adds: its adapters, and the warnings that come with it."""
    request, sequences = job.request, job.texts.calibration
    resumed = min(job.finished_blocks.resumed, len(results.blocks))
    return Report(
        version=version("bitwright"),
        method=request.quantization.method,
        scheme=in_words(request.quantization),
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
            quantized_source=_quantized_source(job),
        ),
        calibration=None if sequences is None else sequences.report(),
        quality=None if results.evaluated is None else results.evaluated.quality,
        served=None if results.evaluated is None else served_words(job),
        shipped=() if results.evaluated is None else results.evaluated.shipped,
        tasks=() if results.evaluated is None else results.evaluated.tasks,
        round_to_nearest=None if results.evaluated is None else results.evaluated.reference,
        embeddings=results.embeddings,
        head=results.head,
        base_job=_base_job_report(job, len(results.blocks)),
        blocks=results.blocks,
        allocation=job.prepared.report,
        goal=job.prepared.goal,
        scales=results.scales,
        finetuning=None if results.finetuned is None else results.finetuned.report,
        loads=results.loads,
        size=size,
        seconds=job.clock.seconds(),
        peak_memory=_peak_memory(job, results),
        blocks_computed=len(results.blocks) - resumed if job.base_job is None else 0,
        blocks_resumed=resumed,
        warnings=tuple(job.reporter.warnings),
    )


def served_words(job: Job) -> str | None:
    """Words for all that the evaluation rounds besides weights, as a server does it; None: nothing."""
    rows = {scheme.name: scheme.row.activations for scheme in job.block_schemes.values() if scheme.row is not None}
    rounded = sorted(name for name, activations in rows.items() if name is not None and activations is not None)
    parts = [f"inputs of linears as a server of {' and '.join(rounded)} rounds them"] if rounded else []
    if any(job.finished_blocks.caches(index) for index in range(len(job.model.blocks))):
        parts.append("keys and values as an FP8 cache gives them back")
    if not parts:
        return None
    return f"{'; '.join(parts)}: checkpoints that are loaded in floating point, as native and merged, do not round them"


def identity_of(job: Job, results: Results) -> Identity:
    """Identity of the result, for files that state it before there is a report."""
    request, model = job.request, source_label(job.request.model)
    trained = results.finetuned is not None and request.adapter is not None
    return Identity(
        version=version("bitwright"),
        model=model,
        model_id=model if request.model.source == "hub" else None,
        revision=job.order.model_revision,
        method=request.quantization.method,
        adapter=request.adapter.kind if trained and request.adapter is not None else None,
        folded=trained and request.merge == "quantized",
        finetuning=None if results.finetuned is None else results.finetuned.report,
        base_training=() if job.base_job is None else job.base_job.training,
        scheme=in_words(request.quantization),
        calibration=None if job.texts.calibration is None else job.texts.calibration.report(),
    )


def _quantized_source(job: Job) -> str | None:
    presented = job.model.checkpoint.presented
    return None if presented is None else presented.what


def _base_job_report(job: Job, blocks: int) -> BaseJobReport | None:
    base_job, job_id = job.base_job, job.request.base_job
    if base_job is None or job_id is None:
        return None
    return BaseJobReport(
        job_id=job_id, blocks_adopted=blocks, adapter_continued=base_job.continues, training=base_job.training
    )


def _peak_memory(job: Job, results: Results) -> PeakMemory:
    """Of the whole job: the stage that finetunes counts anew."""
    peak = peak_memory(job.model.device)
    before = None if results.finetuned is None else results.finetuned.peak_before
    if before is None or peak.device_bytes is None:
        return peak
    return peak.model_copy(update={"device_bytes": max(before, peak.device_bytes)})


def size_of(job: Job, stored: StoredBits, weights: int) -> SizeReport:
    """Size of the job's linears as they ship.

    stored    bits of all quantized linears, by what they hold
    weights   how many weights they are
    """
    model, count = job.model, max(1, weights)
    tensors = _tensors(model)
    before = sum(tensor.size for tensor in tensors if tensor.copies is None)
    quantized = sum(model.names.stored_bytes(f"{name}.weight") for name in job.schemes)
    after = sum(tensor.size for tensor in tensors) - quantized + stored.total // 8
    return SizeReport(
        bytes_original=before,
        bytes_quantized=after,
        quantized_weights=weights,
        bits_per_weight=stored.total / count,
        bits_per_weight_model=after * 8 / _parameters(model),
        parts=StoredParts(**{name: bits / count for name, bits in asdict(stored).items()}),
    )


def _tensors(model: StreamedModel) -> list[StoredTensor]:
    """Tensors of the checkpoint that are parameters of the model, each once.

    Never the modules: stages put others in their place, and parameters without memory.
    """
    stored = {name for parameter in model.names.parameters for name in model.names.stored_names(parameter)}
    return [model.checkpoint.tensors[name] for name in sorted(stored)]


def _parameters(model: StreamedModel) -> int:
    return sum(prod(tensor.shape) for tensor in _tensors(model) if tensor.copies is None)
