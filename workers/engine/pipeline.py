"""A job's computation from order to checkpoints: load, calibrate, block by block, evaluate, export, report."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from app.domain.errors import InvalidDataset
from app.domain.events import AttemptOrder, ResultLine, Stage
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from app.domain.report import BlockReport, ModelReport, Quality, Report, ScaleReport, SizeReport, StoredParts
from app.domain.sources import GeneratedText
from workers.engine.block_pass import BlockPass
from workers.engine.blocks import StreamedModel
from workers.engine.calibration import Windows, calibration_windows, evaluation_windows, load_tokenizer, source_label
from workers.engine.checkpoint import Checkpoint
from workers.engine.clock import StageClock, peak_memory
from workers.engine.evaluation import measure
from workers.engine.generated_text import Generation, generated_windows
from workers.engine.plan import (
    Plan,
    StreamSize,
    make_plan,
    open_device,
    plan_report,
    plan_schemes,
    reproducible,
    scale_dtype,
)
from workers.engine.preparation import Preparation, Prepared, digest, is_needed, needs_text
from workers.engine.ranks import Ranks, joined
from workers.engine.read_ahead import read_ahead
from workers.engine.registry import METHODS
from workers.engine.reporter import Reporter
from workers.engine.resume import ResumeState, code_version, fingerprint
from workers.engine.scale_stage import run_scale_stage
from workers.engine.streams import Stream
from workers.engine.tuning import Tuner
from workers.engine.warm_up import compiling
from workers.formats.writer import check_model, open_writers
from workers.numerics.quantized import StoredBits

CODES_DEPEND_ON = {"quantization", "calibration", "seed"}
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
        tokenizer = load_tokenizer(Path(order.model_path))
        reporter.progress(Stage.LOAD, 1, 1, "models")
        clock.enter(Stage.CALIBRATE)
        with compiling(model, schemes, order.request.quantization, scale_dtype(order.request.formats, model.dtype)):
            texts = read_texts(order, model, reporter, _generation(order, workspace, model, tokenizer, reporter, rank))
        plan = make_plan(order, model, texts.streams(order.request.quantization.needs_original_inputs()))
        reporter.log(
            "activations_placed", place=plan.activations, bytes=plan.activation_bytes, budget=plan.activation_budget
        )
        yield _Job(order, workspace, reporter, clock, model, schemes, texts, plan, Prepared())


@dataclass(frozen=True)
class Texts:
    """The windows of a job; `calibration` is None where weights alone are looked at."""

    calibration: Windows | None
    evaluation: Windows | None

    def streams(self, keep_inputs: bool) -> list[StreamSize]:
        """The sizes of their streams; that of the calibration has its inputs besides if they are kept."""
        found = ((self.calibration, 3 if keep_inputs else 2), (self.evaluation, 2))
        return [StreamSize(w.ids.shape[0], w.ids.shape[1], tensors) for w, tensors in found if w is not None]


@dataclass(frozen=True)
class Findings:
    """What the report tells beside sizes and times."""

    blocks: tuple[BlockReport, ...]
    scales: ScaleReport | None
    quality: Quality | None


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


def read_texts(order: AttemptOrder, model: StreamedModel, reporter: Reporter, generation: Generation) -> Texts:
    """Calibration and evaluation windows of an order; those that the model writes itself are drawn by `generation`.

    Raises:
        InvalidDataset: a file is not as documented or too short, windows are longer than the model's positions, or
            the model is to write text and does not fit whole.
    """
    request, tokenizer = order.request, generation.tokenizer
    paths = [None if p is None else Path(p) for p in (order.calibration_path, order.evaluation_path)]
    calibration = evaluation = None
    if needs_text(request.quantization):
        _check_length(model, "calibration", request.calibration.sequence_length)
        if isinstance(request.calibration.dataset, GeneratedText):
            calibration = generated_windows(request.calibration, request.seed, generation)
        else:
            calibration = calibration_windows(tokenizer, request.calibration, paths[0], request.seed, paths[1])
    if request.evaluation is not None:
        _check_length(model, "evaluation", request.evaluation.sequence_length)
        used = paths[0] if calibration is not None else None
        evaluation = evaluation_windows(tokenizer, request.evaluation, paths[1], request.seed, used)
    for name, windows in (("calibration", calibration), ("evaluation", evaluation)):
        if windows is not None:
            _check_vocabulary(model, windows)
            if windows.overlapping:
                reporter.warning(
                    "overlapping_windows", f"{name}: the builtin text is short for this many tokens; windows overlap"
                )
    return Texts(calibration, evaluation)


def _check_length(model: StreamedModel, name: str, length: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise InvalidDataset(
            f"{name}.sequence_length is {length}; the model has {positions} positions",
            field=f"{name}.sequence_length",
            value=length,
            hint=f"ask for at most {positions}",
        )


def _check_vocabulary(model: StreamedModel, windows: Windows) -> None:
    size = model.config.get_text_config().vocab_size
    if int(windows.ids.max()) >= size:
        raise InvalidDataset(
            f"the tokenizer makes the token id {int(windows.ids.max())}; the model knows {size}",
            field="model",
            hint="give the tokenizer that belongs to the model",
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
    )
    reports = blocks.run()
    state.settle()
    head = blocks.quantize_head()
    if head is not None:
        job.reporter.warning("head_rounded", f"{model.layout.head} is rounded to nearest: only blocks are tuned")
    scales = run_scale_stage(blocks, head)
    del calibration, blocks
    job.clock.enter(Stage.EVALUATE)
    quality = None if evaluation is None else _evaluate(job, evaluation, head, ranks)
    return state, Findings(reports, scales, quality)


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
    """Writes every format from the durable blocks, each read while one is packed, and the same report into each."""
    formats = tuple(dict.fromkeys([*job.order.request.formats, ExportFormat.NATIVE]))
    writers = open_writers(job.workspace / "output", formats, job.model.checkpoint)
    stored, weights, total = StoredBits(), 0, len(state.blocks)
    with closing(read_ahead(state.load, total, torch.device("cpu"))) as blocks:
        for done, block in enumerate(blocks, start=1):
            for name, result in block.items():
                stored += result.stored_bits()
                weights += result.weight.codes.numel()
                source = job.model.sources[f"{name}.weight"].removesuffix(".weight")
                for writer in writers.values():
                    writer.add_linear(source, result, module=name)
            for name, tensor in state.parameters(done - 1).items():
                for writer in writers.values():
                    writer.add_tensor(job.model.sources[name], tensor)
            job.reporter.progress(Stage.EXPORT, done, total + 1, "blocks")
    ignored = [name for name in job.model.linears() if name not in job.schemes]
    for writer in writers.values():
        writer.finish(ignored=ignored)
        for code, message in writer.warnings.items():
            job.reporter.warning(code, message)
    report = _report(job, state, found, _size(job, stored, weights))
    for writer in writers.values():
        writer.describe(report)
    job.reporter.progress(Stage.EXPORT, total + 1, total + 1, "blocks")
    job.model.checkpoint.close()
    return ResultLine(report=report, checkpoints={f.value: f"output/{f.value}" for f in formats})


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
        blocks=found.blocks,
        allocation=job.prepared.report,
        scales=found.scales,
        size=size,
        seconds=job.clock.seconds(),
        peak_memory=peak_memory(job.model.device),
        blocks_computed=len(found.blocks) - resumed,
        blocks_resumed=resumed,
        warnings=tuple(job.reporter.warnings),
    )
