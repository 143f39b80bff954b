"""Opening a job: its model and texts are read, and everything is decided that must be before the first block."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from app.domain.advice import dishonoured_rank
from app.domain.format_rules import head_problems
from app.domain.inputs.quantized.registry import quantized_warning
from app.domain.methods import Candidate, Scheme, WeightSpec
from app.domain.mixes import bound, fallback_words
from app.domain.request.sources import GeneratedText
from app.domain.workload import ModelSize, has_reference, readers_of
from bitwright.errors import FormatCannotHold, InternalError, InvalidRequest
from bitwright.events import Stage
from workers.disk.orders import AttemptOrder
from workers.engine.base_job import BaseJobResult
from workers.engine.clock import StageClock
from workers.engine.device.process_group import ProcessGroup
from workers.engine.device.setup import open_device, reproducible
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.job import Job
from workers.engine.job_texts import Texts, read_files, read_texts
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.foreign_tensors import left_out_warning
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import make_plan, plan_schemes, scale_dtype_of
from workers.engine.quantize.kernel_warm_up import compiling
from workers.engine.reporter import Reporter
from workers.engine.text.generated import Generation
from workers.engine.text.sequences import has_tokenizer, load_tokenizer
from workers.engine.untrusted.asking import JobInput
from workers.formats.gguf.architectures.names import EXPERT
from workers.formats.registry import check_model


@contextmanager
def open_job(order: AttemptOrder, workspace: Path, reporter: Reporter, rank: int, inputs: JobInput) -> Iterator[Job]:
    """The job on the device of one of its processes, with the clock at the stage that comes after loading.

    inputs   of the job, whose texts are being read

    Raises:
        InputError: the model, its data or the request's numbers do not fit together.
        InvalidRequest: the head is to be quantized but tied to the embeddings.
        FormatCannotHold: a format of the request cannot hold this model.
        CorruptCheckpoint: the base job's files are not a result of this model.
    """
    clock = StageClock(Stage.LOAD, reporter.spans.enter)
    device = open_device(order, rank)
    with reproducible(device):
        reporter.progress(Stage.LOAD, 0, 1, "models")
        checkpoint = Checkpoint.open(Path(order.model_path), workspace / f"source-{rank}", inputs.presented)
        model = _opened(checkpoint, order.request.quantization, device)
        checkpoint, request = model.checkpoint, bound(order.request, model.config.to_dict(), model.tied)
        order = order.model_copy(update={"request": request})
        if checkpoint.presented is not None:
            reporter.warning("quantized_source", quantized_warning(checkpoint.presented.what))
        if model.left_out:
            reporter.warning("tensors_left_out", left_out_warning(model.left_out))
        schemes = plan_schemes(model, order.request.quantization)
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in model.linears().items()}
        shapes |= {model.layout.embeddings: (model.known_tokens, model.embedding_width)}
        quantized = {name: shape for name, shape in shapes.items() if name in schemes}
        _demand_one_scheme(order, model)
        check_model(order.request.formats, checkpoint, checkpoint.config["model_type"], quantized)
        _demand_separate_experts(order, model, schemes)
        _demand_alike_experts(order, schemes, list(shapes))
        scale_dtype = scale_dtype_of(order.request.formats, model.dtype)
        base_job = _base_job(order, model, set(schemes))
        schemes = schemes if base_job is None else base_job.schemes
        if not readers_of(order.request) and not has_tokenizer(checkpoint.folder):
            reporter.warning("no_tokenizer", "the model has no tokenizer, so none goes with the result")
        reporter.progress(Stage.LOAD, 1, 1, "models")
        clock.enter(Stage.CALIBRATE)
        compiled = schemes if base_job is None else {}
        with compiling(model, compiled, order.request.quantization, scale_dtype):
            texts = _texts(order, workspace, model, reporter, rank, inputs)
        _advise(order, model, schemes, reporter)
        reference = has_reference(order.request, _size(model))
        sizes = texts.activation_sizes(order.request.quantization.needs_original_inputs(), reference)
        plan = make_plan(order, model, scale_dtype, sizes)
        reporter.log(
            "activations_placed", place=plan.activations, bytes=plan.activation_bytes, budget=plan.activation_budget
        )
        processes = ProcessGroup(rank, order.world_size)
        yield Job(
            order=order,
            workspace=workspace,
            reporter=reporter,
            clock=clock,
            processes=processes,
            model=model,
            schemes=schemes,
            plan=plan,
            texts=texts,
            finished_blocks=FinishedBlocks(workspace / "state", processes),
            base_job=base_job,
            reference=reference,
        )


def _opened(checkpoint: Checkpoint, spec: WeightSpec, device: torch.device) -> StreamedModel:
    """The model with a head of its own where that alone is to be quantized; without a stored copy of a tied one where
    both are.

    Raises:
        InvalidRequest: the head of such a model cannot be told from its embeddings.
    """
    model = StreamedModel.open(checkpoint, device)
    embeds = spec.embeddings_scheme() is not None
    if not model.tied or not (embeds or spec.modules.head is not None):
        return model
    head, embeddings = f"{model.layout.head}.weight", model.names.own_name(f"{model.layout.embeddings}.weight")
    if embeds:
        return (
            StreamedModel.open(model.checkpoint.without([head]), device) if head in model.checkpoint.tensors else model
        )
    if embeddings is not None:
        untied = StreamedModel.open(model.checkpoint.untied(embeddings, head), device)
        if not untied.tied and head not in untied.left_out:
            return untied
    raise InvalidRequest(
        f"{type(model.model).__name__} has one matrix for head and embeddings, and no way to tell them apart",
        field="quantization.modules.head",
        hint="give modules.embeddings the scheme, which then is that of both",
    )


def _demand_one_scheme(order: AttemptOrder, model: StreamedModel) -> None:
    """Refuses formats that hold quantized embeddings only with the head, where that is a matrix that stays as it is.

    Raises:
        FormatCannotHold: one of the request's formats is such a one.
    """
    for problem in head_problems(order.request.formats, order.request.quantization, tied=model.tied):
        hint = "GET /v1/formats lists what each one holds"
        raise FormatCannotHold(problem.detail, field=problem.field, value=problem.value, hint=hint)


def _demand_separate_experts(order: AttemptOrder, model: StreamedModel, schemes: Collection[str]) -> None:
    """Refuses formats that store linears one by one, under the source's names, where the source has experts in one
    tensor and no loader would merge them.

    Raises:
        FormatCannotHold: a packed format for stock loaders is asked for, and quantized experts have no name.
    """
    for index, name in enumerate(order.request.formats):
        nameless = next((n for n in schemes if not model.names.has_name(n)), None)
        if name.info.by_name and nameless is not None:
            raise FormatCannotHold(
                f"{name.value} stores experts one by one; those of {type(model.model).__name__} are one tensor, and "
                f"transformers merges no others ({nameless})",
                field=f"formats.{index}",
                value=name.value,
                hint='ask for formats: ["merged"], ["native"] or ["gguf"]',
            )


def _demand_alike_experts(order: AttemptOrder, schemes: Mapping[str, Scheme], linears: Sequence[str]) -> None:
    """Refuses formats that store the experts of a block as one tensor, where these differ.

    linears   names of all, of which `schemes` are to be quantized

    Raises:
        FormatCannotHold: such a format is asked for, and experts of a block have several schemes, or some have none.
    """
    stacking = [index for index, name in enumerate(order.request.formats) if name.info.stacks_experts]
    found: dict[tuple[str, str], str] = {}
    for name in linears if stacking else ():
        place = EXPERT.fullmatch(name)
        first = name if place is None else found.setdefault((place["before"], place["after"]), name)
        if schemes.get(name) != schemes.get(first):
            value = order.request.formats[stacking[0]].value
            raise FormatCannotHold(
                f"{value} stores all experts of a block in one tensor of one type, and {name} has another scheme than "
                f"{first}",
                field=f"formats.{stacking[0]}",
                value=value,
                hint="give all experts of a block the same scheme, or put all of them into modules.ignore",
            )


def _size(model: StreamedModel) -> ModelSize:
    linears = model.linears()
    head = linears.pop(model.layout.head)
    return ModelSize(sum(linear.weight.numel() for linear in linears.values()), head.weight.numel())


def _advise(order: AttemptOrder, model: StreamedModel, schemes: Mapping[str, Scheme], reporter: Reporter) -> None:
    request = order.request
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in model.linears().items()}
    shapes.pop(model.layout.head, None)
    short = dishonoured_rank(request.quantization, request.adapter, shapes)
    if short is not None:
        reporter.warning("rank_not_reached", short)
    fallback = _fallback(request.quantization, model, schemes)
    if fallback is not None and request.base_job is None:
        reporter.warning("block_types_fall_back", fallback)
    if request.quantization.method == "awq" and request.base_job is None and not model.layout.folds:
        blocks = type(model.blocks[0]).__name__
        reporter.warning("no_scales_to_move", f"awq moves no scales in blocks of {blocks}, and only clips ranges there")


def _fallback(spec: WeightSpec, model: StreamedModel, schemes: Mapping[str, Scheme]) -> str | None:
    """Words on linears whose rows are not whole blocks of the types that the request gives them."""
    if spec.chooses():
        return None
    linears, outer = model.linears(), model.layout.embeddings
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in schemes if name in linears}
    wanted = {name: scheme for name in shapes if (scheme := spec.scheme_of(name)) is not None}
    embeddings = spec.embeddings_scheme()
    if embeddings is not None and outer in schemes:
        wanted[outer], shapes[outer] = embeddings, (model.known_tokens, model.embedding_width)
    bits = sum(Candidate(scheme).stored_bits(shapes[name]) for name, scheme in wanted.items())
    weights = sum(out * width for out, width in (shapes[name] for name in wanted))
    return fallback_words(wanted, {name: shapes[name][1] for name in wanted}, bits / max(1, weights))


def _texts(
    order: AttemptOrder, workspace: Path, model: StreamedModel, reporter: Reporter, rank: int, inputs: JobInput
) -> Texts:
    """The texts of a job: as the limited child has read them, or read here where there is none."""
    readers = readers_of(order.request)
    if not readers:
        inputs.texts()  # its tokenizer is tried before this process loads it
        return Texts(None, None)
    generates = isinstance(order.request.calibration.dataset, GeneratedText)
    files, generation = inputs.texts, None
    if generates or not inputs.limited:
        read = inputs.texts()
        tokenizer = load_tokenizer(model.checkpoint.folder, " and ".join(readers))
        files = (lambda: read) if inputs.limited else partial(read_files, order, tokenizer)
        generation = _generation(workspace, model, tokenizer, reporter, rank)
    return read_texts(order, model, reporter, files, generation)


def _base_job(order: AttemptOrder, model: StreamedModel, quantized: set[str]) -> BaseJobResult | None:
    if order.request.base_job is None:
        return None
    if order.base_job_path is None:
        raise InternalError("the order has no folder of the job that this one starts from", field="base_job")
    return BaseJobResult.open(Path(order.base_job_path), model, quantized)


def _generation(
    workspace: Path,
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    rank: int,
) -> Generation:
    return Generation(
        checkpoint=model.checkpoint,
        tokenizer=tokenizer,
        device=model.device,
        kept=workspace / "generated.safetensors",
        leads=rank == 0,
        tick=lambda done, total: reporter.progress(Stage.CALIBRATE, done, total, "sequences"),
    )
