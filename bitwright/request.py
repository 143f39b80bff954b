"""A job's request as the client reads it, and the names of its fields that may stand at the top.

The service validates requests strictly, with models of its own. These are tolerant: fields that a newer service adds
are kept as extra ones, and a field whose value is not understood is None.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
)

ADAPTER_SHORTHAND = ("rank", "alpha", "dropout")
"""Fields of `adapter` that may stand at the top if `method` is an adapter's recipe."""


class RequestPart(BaseModel):
    """A part of a request, serialized exactly as it came: without the fields that the service did not send."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @field_validator("*", mode="wrap")
    @classmethod
    def _none_where_not_understood(cls, value: object, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return None

    @model_serializer(mode="wrap")
    def _as_sent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class SourceView(RequestPart):
    """Source of a model: the Hub, an upload or a folder of the worker's machine."""

    source: str | None = None
    id: str | None = None
    path: str | None = None

    def shorthand(self) -> str:
        """The source as a request's `model` names it."""
        return self.path or self.id or ""


class BudgetView(RequestPart):
    """A budget that linears share instead of one width."""

    average: float | None = None
    over: str | None = None
    choices: tuple[int | str, ...] | None = None


class GoalView(RequestPart):
    """A goal in place of bits: a distance, a size, or memory that the result is to be served in."""

    kl: float | None = None
    bytes: int | None = None
    memory: int | None = None
    context: int | None = None
    sequences: int | None = None
    choices: tuple[int | str, ...] | None = None


class QuantizationView(RequestPart):
    """Method and scheme."""

    method: str | None = None
    bits: int | BudgetView | None = Field(default=None, union_mode="left_to_right")
    group_size: int | None = None
    symmetric: bool | None = None
    scheme: str | None = None
    at_most: GoalView | None = None
    fits: GoalView | None = None

    def budget(self) -> BudgetView | None:
        """The budget, if widths are chosen by one."""
        return self.bits if isinstance(self.bits, BudgetView) else None


class AdapterRequestView(RequestPart):
    """The adapter that finetuning trains."""

    kind: str | None = None
    rank: int | None = None
    alpha: float | None = None


class RequestView(RequestPart):
    """The full form of a request, every default filled in."""

    model: SourceView | None = None
    quantization: QuantizationView | None = None
    base_job: str | None = None
    adapter: AdapterRequestView | None = None
    finetune: dict[str, Any] | None = None
    merge: str | None = None
    round_offset: bool | None = None
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    formats: tuple[str, ...] | None = None
    seed: int | None = None
    verify: str | None = None
    require: dict[str, Any] | None = None
    device: str | None = None
    priority: int | None = None
    time_limit_seconds: int | None = None
    metadata: dict[str, str] | None = None
    name: str | None = None
    publish: dict[str, Any] | None = None


def shorthand_fields(body: Mapping[str, object]) -> tuple[str, ...]:
    """The fields at the top of `body` that belong to `quantization`: all without another place."""
    return tuple(name for name in body if name not in RequestView.model_fields and name != "dropout")
