"""All texts of a job, read before anything is computed: calibration, evaluation and the adapter's training text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.domain.advice import starved_calibration
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import GeneratedText
from bitwright.errors import InternalError, InvalidDataset
from workers.disk.orders import AttemptOrder
from workers.disk.task_rows import AskedTask
from workers.engine.memory import ActivationSize, device_memory
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.reporter import Reporter
from workers.engine.tasks.reading import check_rows, read_task
from workers.engine.text.documents import Notes
from workers.engine.text.finetuning_texts import FinetuningTexts, read_finetuning_texts
from workers.engine.text.generated import Generation, generated_sequences, with_written
from workers.engine.text.mixture import Probe, mixed_sequences, starved_parts
from workers.engine.text.sequences import Sequences, calibration_sequences, evaluation_sequences

WHOLE_SHARE = 0.75
"""Of a device's memory that the weights of a model may take which is asked tasks."""
CALIBRATION_PROBES, PROBED = 4, 8
"""Sequences of the calibration text that are measured at the most, and sequences of the evaluation for each of them."""


@dataclass(frozen=True)
class Texts:
    """The texts of a job; `calibration` is None for methods that look at weights alone."""

    calibration: Sequences | None
    evaluation: Sequences | None
    finetuning: FinetuningTexts | None = None
    tasks: tuple[AskedTask, ...] = ()
    probes: tuple[Probe, ...] = ()
    """Sequences that are measured beside those of the evaluation, of the same length."""

    @property
    def evaluated(self) -> Tensor | None:
        """All sequences that are measured, int64 (sequences, length), on the host: the evaluation's come first."""
        if self.evaluation is None:
            return None
        return torch.cat([self.evaluation.ids, *(probe.ids for probe in self.probes)])

    def activation_sizes(self, keep_inputs: bool, reference: bool = False) -> list[ActivationSize]:
        """Sizes of their activations: calibration has its inputs besides if they are kept, evaluation its reference."""
        calibration = None if self.calibration is None else self.calibration.ids
        further = None if self.calibration is None else self.calibration.further
        texts = ((calibration, 3 if keep_inputs else 2), (further, 2), (self.evaluated, 3 if reference else 2))
        return [ActivationSize(len(ids), ids.shape[1], tensors) for ids, tensors in texts if ids is not None]


def read_texts(
    order: AttemptOrder,
    model: StreamedModel,
    reporter: Reporter,
    files: Callable[[], Texts] | None,
    generation: Generation | None = None,
) -> Texts:
    """All texts of an order, held against its model.

    files        gives those that are read from files (`read_files`); None if nothing is read
    generation   draws what the model writes itself

    Raises:
        InvalidDataset: a file is not as documented or too short, sequences are longer than the model's positions, or
            the model is to write text and does not fit whole.
    """
    if files is None:
        return Texts(None, None)
    request = order.request
    for name, part in (("finetune", request.finetune), ("evaluation", request.evaluation)):
        if part is not None:
            _check_length(model, name, part.sequence_length)
    if _calibrates(order):
        _check_length(model, "calibration", request.calibration.sequence_length)
    texts = files()
    if texts.finetuning is not None:
        _check_vocabulary(model, texts.finetuning.training.ids)
    if _calibrates(order):
        if generation is not None and isinstance(request.calibration.dataset, GeneratedText):
            texts = replace(texts, calibration=generated_sequences(request.calibration, request.seed, generation))
        if generation is not None:
            texts = replace(texts, calibration=_with_written(request, texts.calibration, generation, reporter))
        calibration = texts.calibration
        starved = None if calibration is None else starved_calibration(request, calibration.text_tokens)
        if starved is not None:
            reporter.warning("starved_calibration", starved)
    if texts.finetuning is not None:
        _warn(reporter, "finetune", texts.finetuning.examples.notes)
    for name, sequences in (("calibration", texts.calibration), ("evaluation", texts.evaluation)):
        if sequences is not None:
            _warn(reporter, name, sequences.notes)
            _check_vocabulary(model, sequences.tokens)
            if sequences.overlapping:
                reporter.warning(
                    "overlapping_windows", f"{name}: the builtin text is short for this many tokens; sequences overlap"
                )
    _check_tasks(model, request, texts.tasks)
    for probe in texts.probes:
        if len(probe.ids):
            _check_vocabulary(model, probe.ids)
    for starved in starved_parts(texts.probes, request.calibration.num_samples):
        reporter.warning("starved_kind", starved)
    return replace(texts, probes=(*_of_calibration(request, texts), *texts.probes))


def _with_written(
    request: JobRequest, calibration: Sequences | None, generation: Generation, reporter: Reporter
) -> Sequences | None:
    """The calibration's text with what the model is to write beside it."""
    if calibration is None or not request.quantization.end_to_end_steps():
        return calibration
    by = replace(generation, kept=generation.kept.with_name("written.safetensors"))
    found = with_written(request.calibration, calibration, request.seed, by)
    if found is not calibration and not found.written:
        reporter.warning("no_written_text", "the model wrote no text to be tuned on: it does not fit whole")
    return found


def _check_tasks(model: StreamedModel, request: JobRequest, asked: Sequence[AskedTask]) -> None:
    """Refuses tasks that the model cannot be asked: rows that are too long, and a model that does not fit whole."""
    tasks = () if request.evaluation is None else request.evaluation.tasks
    size, there = model.checkpoint.size, device_memory(model.device)
    if tasks and size > WHOLE_SHARE * there:
        raise InvalidDataset(
            f"a task asks the whole model: it takes {size >> 20} MiB, the device has {there >> 20} MiB",
            field="evaluation.tasks",
            value=size,
            hint="leave tasks out, or run the job on a device with more memory",
        )
    for number, (task, rows) in enumerate(zip(tasks, asked, strict=True)):
        check_rows(rows, number, (model.positions, model.known_tokens), task.max_new_tokens)


def _of_calibration(request: JobRequest, texts: Texts) -> tuple[Probe, ...]:
    """Some of the calibration's sequences, cut to the evaluation's length: text that the result has seen."""
    calibration, evaluation = texts.calibration, request.evaluation
    if calibration is None or evaluation is None or calibration.ids.shape[1] < evaluation.sequence_length:
        return ()
    count = min(CALIBRATION_PROBES, evaluation.num_samples // PROBED)
    if not count:
        return ()
    return (Probe("calibration", calibration.ids[:count, : evaluation.sequence_length].clone(), calibrates=True),)


def read_files(order: AttemptOrder, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The texts of an order that are read from files or are builtin, as tokens.

    Raises:
        InvalidDataset: a file is not as documented or too short.
    """
    request = order.request
    paths = (order.calibration_path, order.evaluation_path, order.finetuning_path)
    calibration_file, evaluation_file, finetuning_file = (None if path is None else Path(path) for path in paths)
    calibration = evaluation = finetuning = None
    probes: tuple[Probe, ...] = ()
    mixed = _mixture_files(order)
    if request.finetune is not None:
        finetuning = read_finetuning_texts(tokenizer, request.finetune, finetuning_file, evaluation_file)
    if _calibrates(order) and request.calibration.mixture:
        calibration, probes = mixed_sequences(
            tokenizer, request.calibration, mixed, request.seed, request.evaluation, evaluation_file
        )
    elif _calibrates(order) and not isinstance(request.calibration.dataset, GeneratedText):
        calibration = calibration_sequences(
            tokenizer, request.calibration, calibration_file, request.seed, evaluation_file
        )
    if request.evaluation is not None:
        if request.base_job is not None:
            # What calibrated an earlier job is known only if evaluation reads the same dataset.
            shared = request.evaluation.dataset == request.calibration.dataset
            calibration_file = evaluation_file if shared else None
        if not request.quantization.reads_text():
            calibration_file = None
        used = mixed.values() if _calibrates(order) else ()
        evaluation = evaluation_sequences(
            tokenizer, request.evaluation, evaluation_file, request.seed, calibration_file, finetuning_file, *used
        )
    return Texts(calibration, evaluation, finetuning, _tasks(order, tokenizer), probes)


def _tasks(order: AttemptOrder, tokenizer: PreTrainedTokenizerBase) -> tuple[AskedTask, ...]:
    tasks, asked = () if order.request.evaluation is None else order.request.evaluation.tasks, []
    for number, task in enumerate(tasks):
        field = f"evaluation.tasks.{number}.dataset"
        if field not in order.other_texts:
            raise InternalError(f"the order has no file of {field}", field=field)
        asked.append(read_task(tokenizer, task, Path(order.other_texts[field]), number))
    return tuple(asked)


def _mixture_files(order: AttemptOrder) -> dict[int, Path]:
    """Files of the parts of the calibration's mixture, by their numbers; builtin text has none."""
    fields = {f"calibration.mixture.{n}.dataset": n for n in range(len(order.request.calibration.mixture))}
    return {fields[field]: Path(path) for field, path in order.other_texts.items() if field in fields}


def _calibrates(order: AttemptOrder) -> bool:
    return order.request.base_job is None and order.request.quantization.reads_text()


def _warn(reporter: Reporter, name: str, notes: Notes) -> None:
    for code, message in notes.warnings(f"{name}.dataset"):
        reporter.warning(code, message)


def _check_length(model: StreamedModel, name: str, length: int) -> None:
    positions = model.positions
    if positions is not None and length > positions:
        raise InvalidDataset(
            f"{name}.sequence_length is {length}; the model has {positions} positions",
            field=f"{name}.sequence_length",
            value=length,
            hint=f"ask for at most {positions}",
        )


def _check_vocabulary(model: StreamedModel, ids: Tensor) -> None:
    size = model.known_tokens
    if int(ids.max()) >= size:
        raise InvalidDataset(
            f"the tokenizer makes the token id {int(ids.max())}; the model knows {size}",
            field="model",
            hint="give the tokenizer that belongs to the model",
        )
