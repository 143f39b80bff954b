"""Decisions before the first block: device, threads, dtypes, micro-batch, where activations live, what is quantized."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from app.domain.formats import FORMATS, ExportFormat, ScaleDtype
from app.domain.methods import Scheme, WeightSpec
from app.domain.methods.module_rules import rule_errors
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
    )


def plan_report(plan: Plan) -> dict[str, str | int | float | bool | None]:
    """The plan as the report shows it."""
    return asdict(plan) | {"scale_dtype": _name(plan.scale_dtype)}


def scale_dtype_of(formats: tuple[ExportFormat, ...], dtype: torch.dtype) -> torch.dtype:
    """The dtype in which every one of the formats stores scales without rounding them.

    Formats that differ in it do not go together: the request is refused.
    """
    wanted = {FORMATS[name].scales for name in formats}
    if ScaleDtype.MODEL in wanted:
        return dtype
    if ScaleDtype.FLOAT16 in wanted:
        return torch.float16
    return torch.float32 if dtype == torch.float64 else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_schemes(model: StreamedModel, spec: WeightSpec) -> dict[str, Scheme]:
    """Full name -> scheme of every linear that is to be quantized, fitted to its inputs.

    Raises:
        UnknownModule: a pattern matches no linear.
        IndivisibleGroup: a group size does not divide a linear's inputs.
        InvalidRequest: the head is to be quantized, but it is the embedding matrix; or nothing is left to quantize.
    """
    inputs = {name: linear.in_features for name, linear in model.linears().items()}
    for error in rule_errors(spec, inputs, head=model.layout.head, tied=model.tied):
        raise error
    return {n: scheme.fitted(width) for n, width in inputs.items() if (scheme := spec.scheme_of(n)) is not None}
