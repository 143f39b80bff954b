"""The stage that trains adapters beside the finished quantized weights: what it takes over, and what it leaves.

texts        read before anything is quantized, so that a row that cannot be learned is named at once
state        the finished blocks, whose weights are the base; checkpoints of training lie beside them
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from app.domain.request.finetuning import Finetune
from bitwright.report import FinetuningReport, LossPoint, TextReport
from workers.contracts.adapters import AdapterFactory, TrainableAdapter
from workers.engine.device.process_group import ProcessGroup
from workers.engine.finetune.checkpoints import TrainingState
from workers.engine.finetune.memory_plan import TrainingPlan, plan_training
from workers.engine.finetune.resident_model import Residence, ResidentModel, resident
from workers.engine.finetune.trainer import TrainingOutcome, TrainingTask, judging_batches, mean_loss, train
from workers.engine.fingerprint import fingerprint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.finished_blocks import FinishedBlocks
from workers.engine.reporter import Reporter
from workers.engine.seeds import derived_seed
from workers.engine.text.finetuning_texts import FinetuningTexts
from workers.engine.text.sequences import source_label
from workers.numerics.quantized import LinearResult

LoadBlock = Callable[[int], Mapping[str, LinearResult]]

MOST_POINTS = 50
"""Of the loss curve in the report."""


@dataclass(frozen=True)
class FinetuningStage:
    """What the stage works with.

    names        of the quantized linears of the blocks
    head         dequantized weight of the head, where that is quantized too
    identity     of everything but this stage that decides what it trains
    divisor      by which micro-batches are smaller after an attempt that ran out of memory
    """

    model: StreamedModel
    part: Finetune
    texts: FinetuningTexts
    attach: AdapterFactory
    names: frozenset[str]
    state: FinishedBlocks
    folder: Path
    identity: Mapping[str, object]
    head: Tensor | None
    seed: int
    divisor: int
    reporter: Reporter
    processes: ProcessGroup


@dataclass(frozen=True)
class Finetuned:
    """Trained adapters by full linear name, on the host, and the report.

    peak_before   most bytes of the device that were held before the stage
    """

    adapters: Mapping[str, nn.Module]
    report: FinetuningReport
    peak_before: int | None


def run_finetuning(stage: FinetuningStage) -> Finetuned:
    """Trains the adapters, from their last checkpoint on.

    On running out of memory the stage begins again with half as many sequences at once; the blocks are not touched.

    Raises:
        NumericalFailure: the loss is not finite.
        UnsupportedArchitecture: the model does more after its blocks than norm and head.
    """
    peak_before, divisor = _forget_peak(stage.model.device), _last_divisor(stage)
    while (trained := _trained(stage, divisor, peak_before)) is None:
        # Here, where nothing holds the tensors of the failed step any more.
        peak = _forget_peak(stage.model.device)
        peak_before = peak if peak_before is None or peak is None else max(peak_before, peak)
        divisor *= 2
    report = trained.report
    for name, value in (("finetuning_loss_before", report.loss_before), ("finetuning_loss", report.loss_after)):
        if value is not None:
            stage.reporter.metric(name, value)
    return trained


def shipped_loss(stage: FinetuningStage, told: FinetuningReport, load: LoadBlock) -> float | None:
    """The held-out loss with weights in which the adapters lie; None if nothing is held out.

    told   by the training before
    load   linears of a block as they ship, by full name
    """
    model, seed = stage.model, derived_seed(stage.seed, "finetune")
    batches = judging_batches(stage.texts.held_out, stage.part, told.micro_batch, seed, stage.processes)
    if not stage.processes.total(len(batches)):
        return None
    how = Residence(length=stage.part.sequence_length, keeps=told.weights_kept, recomputed=0)
    changed = stage.state.parameters
    with resident(model, load, _no_adapters, how, seed=seed, head=stage.head, changed=changed) as found:
        return mean_loss(found, (batch.to(model.device) for batch in batches), stage.processes)


def _no_adapters(linears: Mapping[str, LinearResult], seed: int) -> dict[str, TrainableAdapter]:  # noqa: ARG001 - a protocol
    return {}


def _last_divisor(stage: FinetuningStage) -> int:
    """That of the last checkpoint, where an earlier attempt had to lower it; the stage's own if there is none."""
    divisor = stage.divisor
    while stage.processes.alone:
        plan = _plan(stage, divisor)
        if TrainingState(stage.folder, _fingerprint(stage, plan)).progress.step:
            return divisor
        if plan.micro_batch == 1:
            break
        divisor *= 2
    return stage.divisor


def _plan(stage: FinetuningStage, divisor: int) -> TrainingPlan:
    longest = max(text.length for text in (stage.texts.training, stage.texts.held_out) if text is not None)
    pass_bytes, names = stage.attach.pass_bytes, set(stage.names)
    return plan_training(
        stage.model, names, stage.part, longest, divisor=divisor, processes=stage.processes, pass_bytes=pass_bytes
    )


def _trained(stage: FinetuningStage, divisor: int, peak_before: int | None) -> Finetuned | None:
    """Training with micro-batches smaller by `divisor`; None if memory ran out and less may do.

    Raises:
        torch.OutOfMemoryError: not even one sequence at a time fits; or other ranks wait for this one.
    """
    model, plan = stage.model, _plan(stage, divisor)
    stage.reporter.log("training_planned", **asdict(plan))
    how = Residence(length=stage.part.sequence_length, keeps=plan.keeps, recomputed=plan.recomputed)
    seed, state = derived_seed(stage.seed, "finetune"), stage.state
    try:
        with resident(
            model, state.load, stage.attach, how, seed=seed, head=stage.head, changed=state.parameters
        ) as found:
            outcome = train(_task(stage, plan, found, seed))
            report = _report(stage, plan, outcome, _peak(model.device))
            return Finetuned({n: adapter.to("cpu") for n, adapter in found.adapters.items()}, report, peak_before)
    except torch.OutOfMemoryError:
        if plan.micro_batch == 1 or not stage.processes.alone:
            raise
    stage.reporter.log("training_lowered", micro_batch=plan.micro_batch)
    return None


def _task(stage: FinetuningStage, plan: TrainingPlan, found: ResidentModel, seed: int) -> TrainingTask:
    return TrainingTask(
        resident=found,
        part=stage.part,
        training=stage.texts.training,
        held_out=stage.texts.held_out,
        micro_batch=plan.micro_batch,
        captures=plan.captures,
        seed=seed,
        state=TrainingState(stage.folder, _fingerprint(stage, plan), stage.processes),
        reporter=stage.reporter,
        processes=stage.processes,
        milestones=len(stage.model.blocks),
    )


def _fingerprint(stage: FinetuningStage, plan: TrainingPlan) -> str:
    decides = {name: value for name, value in asdict(plan).items() if name != "captures"}
    parts = {"finetune": stage.part.model_dump(mode="json"), "text": stage.texts.sha256, "plan": decides}
    return fingerprint({**stage.identity, **parts})


def _report(stage: FinetuningStage, plan: TrainingPlan, outcome: TrainingOutcome, peak: int | None) -> FinetuningReport:
    texts, part, progress = stage.texts, stage.part, outcome.progress
    validations = progress.validations
    kept = progress.best_step if part.patience is not None and progress.best_step is not None else progress.step
    after = [validation.loss for validation in validations if validation.step == kept]
    return FinetuningReport(
        text=TextReport(
            source=source_label(part.dataset),
            sha256=texts.sha256,
            num_samples=len(texts.training),
            sequence_length=part.sequence_length,
            tokens=texts.training.tokens,
        ),
        dataset_kind=part.dataset.source,
        learning_rate=part.learning_rate,
        batch_size=part.batch_size,
        tokens_read=progress.tokens,
        held_out_sequences=0 if texts.held_out is None else min(len(texts.held_out), part.validation_sequences),
        rows_cut=texts.examples.cut,
        rows_dropped=texts.examples.dropped,
        trainable_parameters=outcome.parameters,
        steps=part.steps,
        steps_done=progress.step,
        steps_kept=kept,
        steps_resumed=outcome.resumed,
        stopped_early=progress.step < part.steps,
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
        part = losses[first:last]
        sound = part[part.isfinite()]
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
