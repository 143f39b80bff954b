"""A job as all of its stages find it: model, texts, schemes and plan, read and decided before its first block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from app.domain.advice import dishonoured_rank
from app.domain.inputs.architectures import read_dimensions
from app.domain.methods import Scheme
from app.domain.workload import has_reference, readers_of
from bitwright.errors import InternalError
from bitwright.events import Stage
from workers.disk.orders import AttemptOrder
from workers.engine.clock import StageClock
from workers.engine.device.setup import open_device, reproducible
from workers.engine.job_texts import Texts, read_texts
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.foreign_tensors import left_out_warning
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan, make_plan, plan_schemes, scale_dtype
from workers.engine.quantize.base_job import BaseJobResult
from workers.engine.quantize.kernel_warm_up import compiling
from workers.engine.quantize.preparation import Prepared
from workers.engine.quantize.registry import needs_text
from workers.engine.reporter import Reporter
from workers.engine.text.generated import Generation
from workers.engine.text.sequences import has_tokenizer, load_tokenizer
from workers.formats.writer import check_model


@dataclass(frozen=True)
class Job:
    """An order with everything that was read for it and decided before its first block.

    schemes    of every linear that is quantized, by full name
    prepared   what the method asked to know of the whole model; nothing until that was found out
    base_job    the result that this job starts from
    reference  whether round to nearest is measured besides
    """

    order: AttemptOrder
    workspace: Path
    reporter: Reporter
    clock: StageClock
    model: StreamedModel
    schemes: dict[str, Scheme]
    texts: Texts
    plan: Plan
    prepared: Prepared
    base_job: BaseJobResult | None = None
    reference: bool = False


@contextmanager
def open_job(order: AttemptOrder, workspace: Path, reporter: Reporter, rank: int) -> Iterator[Job]:
    """The job on a rank's device, with the clock at the stage that comes after loading.

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but tied to the embeddings.
        FormatCannotHold: a format of the request cannot hold this model.
        CorruptCheckpoint: the earlier job's files are not a result of this model.
    """
    clock = StageClock(Stage.LOAD)
    device = open_device(order, rank)
    with reproducible(device):
        reporter.progress(Stage.LOAD, 0, 1, "models")
        checkpoint = Checkpoint.open(Path(order.model_path))
        model = StreamedModel.open(checkpoint, device)
        checkpoint = model.checkpoint
        if model.left_out:
            reporter.warning("tensors_left_out", left_out_warning(model.left_out))
        schemes = plan_schemes(model, order.request.quantization)
        inputs = {name: linear.in_features for name, linear in model.linears().items() if name in schemes}
        check_model(order.request.formats, checkpoint, checkpoint.config["model_type"], inputs)
        base_job = _base_job(order, model, set(schemes))
        schemes = schemes if base_job is None else base_job.schemes
        tokenizer = _tokenizer(order, reporter)
        reporter.progress(Stage.LOAD, 1, 1, "models")
        clock.enter(Stage.CALIBRATE)
        compiled = schemes if base_job is None else {}
        with compiling(model, compiled, order.request.quantization, scale_dtype(order.request.formats, model.dtype)):
            reading = None if tokenizer is None else _generation(order, workspace, model, tokenizer, reporter, rank)
            texts = read_texts(order, model, reporter, reading)
        _advise(order, model, reporter)
        reference = has_reference(order.request, read_dimensions(checkpoint.config))
        streams = texts.streams(order.request.quantization.needs_original_inputs(), reference)
        plan = make_plan(order, model, streams)
        reporter.log(
            "activations_placed", place=plan.activations, bytes=plan.activation_bytes, budget=plan.activation_budget
        )
        prepared = Prepared()
        yield Job(order, workspace, reporter, clock, model, schemes, texts, plan, prepared, base_job, reference)


def _advise(order: AttemptOrder, model: StreamedModel, reporter: Reporter) -> None:
    request = order.request
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in model.linears().items()}
    shapes.pop(model.layout.head, None)
    short = dishonoured_rank(request.quantization, request.adapter, shapes)
    if short is not None:
        reporter.warning("rank_not_reached", short)


def _tokenizer(order: AttemptOrder, reporter: Reporter) -> PreTrainedTokenizerBase | None:
    """The tokenizer if anything of the job reads text; None, with a warning where the result has none, if not."""
    readers = readers_of(order.request, observes=needs_text(order.request.quantization))
    folder = Path(order.model_path)
    if readers:
        return load_tokenizer(folder, " and ".join(readers))
    if not has_tokenizer(folder):
        reporter.warning("no_tokenizer", "the model has no tokenizer, so none goes with the result")
    return None


def _base_job(order: AttemptOrder, model: StreamedModel, quantized: set[str]) -> BaseJobResult | None:
    if order.request.base_job is None:
        return None
    if order.base_job_path is None:
        raise InternalError("the order has no folder of the job that this one starts from", field="base_job")
    base_job = BaseJobResult.open(Path(order.base_job_path), model, quantized)
    base_job.demand_held(order.request.formats)
    return base_job


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
