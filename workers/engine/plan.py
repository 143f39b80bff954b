"""Decisions before the first block: device, threads, dtypes, micro-batch, where activations live, what is quantized."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from app.domain.formats import FORMATS, ExportFormat, ScaleDtype
from app.domain.methods import Scheme, WeightSpec
from app.domain.methods.module_rules import field_of_name, rule_errors
from bitwright.errors import InvalidRequest
from workers.disk.orders import AttemptOrder
from workers.engine.memory import (
    ACTIVATION_BYTES,
    ActivationSize,
    activation_budget,
    activation_bytes,
    largest_micro_batch,
    largest_pass_batch,
)
from workers.engine.model.streamed_model import StreamedModel
from workers.numerics.product_dtype import product_dtype


@dataclass(frozen=True)
class Plan:
    """Decisions of the engine; in the report, and most of it in the fingerprint that a resumed attempt must share.

    micro_batch     sequences that go through a block at once, with gradients
    pass_batch      the same without gradients
    scale_dtype     of stored scales, learned from the formats before anything is optimized
    activations     where they live; codes are the same wherever that is
    activation_bytes, activation_budget
                    bytes that a process's activations need, and its device could give; None for a device without memory
                    of its own
    world_size      processes that share the sequences of each text (`workers.engine.device.process_group`)
    products        dtype that blocks multiply matrices in (`workers.numerics.product_dtype`)
    """

    device: str
    threads: int
    dtype: str
    scale_dtype: torch.dtype
    micro_batch: int
    pass_batch: int
    torch_version: str
    activations: Literal["device", "host"]
    activation_bytes: int
    activation_budget: int | None
    world_size: int = 1
    products: str = ""

    def decides_codes(self) -> dict[str, object]:
        """The part of the plan that a resumed attempt must share."""
        return {name: value for name, value in plan_report(self).items() if not name.startswith("activation")}


def make_plan(order: AttemptOrder, model: StreamedModel, scale_dtype: torch.dtype, sizes: list[ActivationSize]) -> Plan:
    """Plans a job over these activations, which its processes share. The model must not be loaded yet."""
    sizes = [replace(size, sequences=math.ceil(size.sequences / order.world_size)) for size in sizes]
    longest = max((size.length for size in sizes), default=1)
    micro_batch = max(1, largest_micro_batch(model, longest) // order.micro_batch_divisor)
    needed, budget = activation_bytes(model, sizes), activation_budget(model, longest, micro_batch)
    return Plan(
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=_name(model.dtype),
        scale_dtype=scale_dtype,
        micro_batch=micro_batch,
        pass_batch=max(1, largest_pass_batch(model, longest) // order.micro_batch_divisor),
        torch_version=torch.__version__,
        activations="device" if budget is not None and needed <= min(budget, ACTIVATION_BYTES) else "host",
        activation_bytes=needed,
        activation_budget=budget,
        world_size=order.world_size,
        products=_name(product_dtype(model.device, model.dtype)),
    )


def plan_report(plan: Plan) -> dict[str, str | int | float | bool | None]:
    """The plan as the report shows it."""
    return asdict(plan) | {"scale_dtype": _name(plan.scale_dtype)}


def scale_dtype_of(formats: tuple[ExportFormat, ...], dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scales are fitted, so that every one of the formats stores them without rounding.

    dtype   the model's

    Of bf16 and fp16 together, and where a format's runtimes make the one of the other, it is bf16, whose numbers from
    2^-17 on are fp16's, too; what lies below is rounded at the export (`workers.engine.stored_scales`). Of fp32 and
    fp16 it is fp16.
    """
    wanted = {FORMATS[name].scales for name in formats}
    if ScaleDtype.COMMON in wanted or wanted >= {ScaleDtype.MODEL, ScaleDtype.FLOAT16}:
        return dtype if dtype.itemsize == torch.float16.itemsize else torch.float16
    if ScaleDtype.MODEL in wanted:
        return dtype
    if ScaleDtype.FLOAT16 in wanted:
        return torch.float16
    return torch.float32 if dtype == torch.float64 else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_schemes(model: StreamedModel, spec: WeightSpec) -> dict[str, Scheme]:
    """Full name -> scheme of every linear that is to be quantized, fitted to its inputs, and of the embeddings.

    A head that is tied to the embeddings is their matrix, and has no scheme of its own.

    Raises:
        UnknownModule: a pattern matches no linear.
        IndivisibleGroup: a group size does not divide a linear's inputs.
        InvalidRequest: the head is to be quantized, but it is the embedding matrix; or nothing is left to quantize.
    """
    inputs, head = {name: linear.in_features for name, linear in model.linears().items()}, model.layout.head
    for error in rule_errors(spec, inputs, head=head, tied=model.tied, width=model.embedding_width):
        raise error
    schemes = {name: scheme.fitted(inputs[name]) for name in inputs if (scheme := spec.scheme_of(name)) is not None}
    if model.tied:
        schemes.pop(head, None)
    elif spec.modules.head is not None and (of_head := spec.head_scheme()) is not None:
        schemes[head] = of_head.fitted(inputs[head])
    embeddings = spec.embeddings_scheme()
    if embeddings is not None:
        schemes = {model.layout.embeddings: embeddings.fitted(model.embedding_width), **schemes}
    _demand_weights_alone(spec, head, schemes.get(head))
    _demand_weights_alone(spec, model.layout.embeddings, embeddings)
    return schemes


def _demand_weights_alone(spec: WeightSpec, name: str, scheme: Scheme | None) -> None:
    if scheme is not None and scheme.row is not None and scheme.row.calibrated:
        detail = f"{scheme.name} stores a number of a linear's inputs, and those of {name} are not looked at"
        hint = "give it a scheme of weights alone, or leave it as it is"
        raise InvalidRequest(detail, field=field_of_name(spec, name), value=scheme.name, hint=hint)
