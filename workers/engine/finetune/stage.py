"""The stage that trains adapters beside the finished quantized weights.

texts            read before anything is quantized, so that a row that cannot be learned is named at once
finished blocks  their weights are the base; checkpoints of training lie beside them
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from app.domain.adapters import AdapterSpec
from app.domain.request.finetuning import Finetune
from bitwright.events import Stage
from bitwright.report import FinetuningReport, LossPoint, TextReport
from workers.adapters.attaching import Attach
from workers.contracts.adapters import AdapterFactory, TrainableAdapter
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.finetune.checkpoints import TrainingState
from workers.engine.finetune.memory_plan import TrainingPlan, plan_training
from workers.engine.finetune.resident_model import Residence, ResidentModel, resident
from workers.engine.finetune.trainer import TrainingOutcome, TrainingTask, mean_loss, train, validation_batches
from workers.engine.fingerprint import fingerprint
from workers.engine.job import Job
from workers.engine.quantize.outer_matrices import substitutes
from workers.engine.seeds import derived_seed
from workers.engine.shipped import Numbers, TrainedAdapters, shipments_of
from workers.engine.text.finetuning_texts import FinetuningTexts
from workers.engine.text.sequences import source_label
from workers.numerics.quantized import LinearResult

MOST_POINTS = 50
"""Of the loss curve in the report."""


@dataclass(frozen=True)
class Finetuned:
    """Trained adapters and the report.

    peak_before   most bytes of the device that were held before the stage
    """

    trained: TrainedAdapters
    report: FinetuningReport
    peak_before: int | None


@dataclass(frozen=True)
class _Finetuning:
    """A job that finetunes.

    attach   makes the adapters
    head     dequantized weight of the head, where that is quantized too
    """

    job: Job
    config: Finetune
    adapter: AdapterSpec
    texts: FinetuningTexts
    attach: AdapterFactory
    head: Tensor | None

    @property
    def seed(self) -> int:
        return derived_seed(self.job.seed, "finetune")

    @property
    def embeddings(self) -> Mapping[str, Tensor]:
        """Quantized embeddings, dequantized, by parameter; empty where they are not quantized."""
        return substitutes(self.job.model, self.job.finished_blocks)

    def fingerprint(self, plan: TrainingPlan) -> str:
        """sha256 of everything that decides the adapters; how often passes are captured changes nothing."""
        parts = {
            "codes": self.job.finished_blocks.fingerprint,
            "adapter": self.job.request.model_dump(mode="json", include={"adapter"}),
            "finetune": self.config.model_dump(mode="json"),
            "text": self.texts.sha256,
            "plan": {name: value for name, value in asdict(plan).items() if name != "captures"},
        }
        return fingerprint(parts)

    def state(self, plan: TrainingPlan, processes: ProcessGroup = SINGLE_PROCESS) -> TrainingState:
        """The checkpoints of training under this plan."""
        return TrainingState(self.job.state_folder, self.fingerprint(plan), processes)


def run(job: Job, head: Tensor | None) -> Finetuned | None:
    """Trains the adapters of a job that finetunes, from their last checkpoint on.

    On running out of memory the stage begins again with half as many sequences at once; the blocks are not touched.

    head   dequantized weight of the head, where that is quantized too

    Raises:
        NumericalFailure: the loss is not finite.
        UnsupportedArchitecture: a training step cannot make the blocks' arguments for its rows.
    """
    config, adapter, texts = job.request.finetune, job.request.adapter, job.texts.finetuning
    if config is None or adapter is None or texts is None:
        return None
    job.clock.enter(Stage.FINETUNE)
    attach = Attach(adapter, {} if job.base_job is None else job.base_job.adapters)
    stage = _Finetuning(job, config.of_sequences(len(texts.training.ids)), adapter, texts, attach, head)
    finetuned = _finetuned(stage)
    if shipments_of(job)[0].numbers is not Numbers.WHOLE:
        return finetuned
    loss = _shipped_loss(stage, finetuned)
    return replace(finetuned, report=finetuned.report.model_copy(update={"loss_shipped": loss}))


def _finetuned(stage: _Finetuning) -> Finetuned:
    device = stage.job.model.device
    peak_before, divisor = _forget_peak(device), _last_divisor(stage)
    while (finetuned := _trained(stage, divisor, peak_before)) is None:
        # Here, where nothing holds the tensors of the failed step any more.
        peak = _forget_peak(device)
        peak_before = peak if peak_before is None or peak is None else max(peak_before, peak)
        divisor *= 2
    report = finetuned.report
    for name, value in (("finetuning_loss_before", report.loss_before), ("finetuning_loss", report.loss_after)):
        if value is not None:
            stage.job.reporter.metric(name, value)
    return finetuned


def _shipped_loss(stage: _Finetuning, finetuned: Finetuned) -> float | None:
    """The held-out loss with weights in which the adapters lie; None if nothing is held out."""
    job, config, report = stage.job, stage.config, finetuned.report
    batches = validation_batches(stage.texts.held_out, config, report.micro_batch, stage.seed, job.processes)
    if not job.processes.total(len(batches)):
        return None

    def shipped(index: int) -> dict[str, LinearResult]:
        return finetuned.trained.results(job.finished_blocks.load(index))

    how = Residence(length=config.sequence_length, keeps=report.weights_kept, recomputed=0)
    changed = job.finished_blocks.parameters
    with resident(
        job.model,
        shipped,
        _no_adapters,
        how,
        seed=stage.seed,
        head=stage.head,
        embeddings=stage.embeddings,
        changed=changed,
    ) as model:
        return mean_loss(model, (batch.to(job.model.device) for batch in batches), job.processes)


def _no_adapters(linears: Mapping[str, LinearResult], seed: int) -> dict[str, TrainableAdapter]:  # noqa: ARG001 - a protocol
    return {}


def _last_divisor(stage: _Finetuning) -> int:
    """That of the last checkpoint, where an earlier attempt had to lower it; the order's own if there is none."""
    divisor = stage.job.order.micro_batch_divisor
    while stage.job.processes.alone:
        plan = _plan(stage, divisor)
        if stage.state(plan).progress.step:
            return divisor
        if plan.micro_batch == 1:
            break
        divisor *= 2
    return stage.job.order.micro_batch_divisor


def _plan(stage: _Finetuning, divisor: int) -> TrainingPlan:
    longest = max(text.length for text in (stage.texts.training, stage.texts.held_out) if text is not None)
    return plan_training(
        stage.job.model,
        set(stage.job.block_schemes),
        stage.config,
        longest,
        divisor=divisor,
        processes=stage.job.processes,
        pass_bytes=stage.attach.pass_bytes,
    )


def _trained(stage: _Finetuning, divisor: int, peak_before: int | None) -> Finetuned | None:
    """Training with micro-batches smaller by `divisor`; None if memory ran out and less may do.

    Raises:
        torch.OutOfMemoryError: not even one sequence at a time fits; or other processes wait for this one.
    """
    job, plan = stage.job, _plan(stage, divisor)
    job.reporter.log("training_planned", **asdict(plan))
    how = Residence(length=stage.config.sequence_length, keeps=plan.keeps, recomputed=plan.recomputed)
    finished = job.finished_blocks
    try:
        with resident(
            job.model,
            finished.load,
            stage.attach,
            how,
            seed=stage.seed,
            head=stage.head,
            embeddings=stage.embeddings,
            changed=finished.parameters,
        ) as model:
            outcome = train(_task(stage, plan, model))
            report = _report(stage, plan, outcome, _peak(job.model.device))
            adapters = {name: module.to("cpu") for name, module in model.adapters.items()}
            return Finetuned(TrainedAdapters.of(job.request, stage.adapter, adapters), report, peak_before)
    except torch.OutOfMemoryError:
        if plan.micro_batch == 1 or not job.processes.alone:
            raise
    job.reporter.log("training_lowered", micro_batch=plan.micro_batch)
    return None


def _task(stage: _Finetuning, plan: TrainingPlan, model: ResidentModel) -> TrainingTask:
    job = stage.job
    return TrainingTask(
        resident=model,
        config=stage.config,
        training=stage.texts.training,
        held_out=stage.texts.held_out,
        micro_batch=plan.micro_batch,
        captures=plan.captures,
        seed=stage.seed,
        state=stage.state(plan, job.processes),
        reporter=job.reporter,
        processes=job.processes,
        milestones=(job.rounds_before + 1) * len(job.model.blocks),
        is_told=job.order.is_told,
    )


def _report(stage: _Finetuning, plan: TrainingPlan, outcome: TrainingOutcome, peak: int | None) -> FinetuningReport:
    texts, config, progress = stage.texts, stage.config, outcome.progress
    validations = progress.validations
    kept = progress.best_step if config.patience is not None and progress.best_step is not None else progress.step
    after = [validation.loss for validation in validations if validation.step == kept]
    return FinetuningReport(
        text=TextReport(
            source=source_label(config.dataset),
            sha256=texts.sha256,
            num_samples=len(texts.training),
            sequence_length=config.sequence_length,
            tokens=texts.training.tokens,
        ),
        dataset_kind=config.dataset.source,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        tokens_read=progress.tokens,
        held_out_sequences=0 if texts.held_out is None else min(len(texts.held_out), config.validation_sequences),
        rows_cut=texts.examples.cut,
        rows_dropped=texts.examples.dropped,
        trainable_parameters=outcome.parameters,
        steps=config.steps,
        steps_done=progress.step,
        steps_kept=kept,
        steps_resumed=outcome.resumed,
        stopped_early=progress.step < config.steps,
        losses=tuple(_curve(outcome.losses)),
        loss_before=validations[0].loss if validations else None,
        loss_after=after[-1] if after else None,
        validations=validations,
        micro_batch=plan.micro_batch,
        blocks_recomputed=plan.recomputed,
        weights_kept=plan.keeps,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        seconds=progress.seconds,
        peak_device_bytes=peak,
    )


def _curve(losses: Tensor) -> Iterator[LossPoint]:
    """Means over runs of steps of about equal number; steps whose loss was not finite are left out."""
    count, first = min(MOST_POINTS, len(losses)), 0
    for number in range(1, count + 1):
        last = len(losses) * number // count
        interval = losses[first:last]
        sound = interval[interval.isfinite()]
        if len(sound):
            yield LossPoint(step=last, loss=float(sound.mean()))
        first = last


def _forget_peak(device: torch.device) -> int | None:
    """The peak of the device's memory until now; from now on it is counted anew, without what is only cached."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
