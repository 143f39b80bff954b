"""Typed messages as JSON columns."""

import math
from collections.abc import Iterator

from pydantic import BaseModel

from app.store.models import JsonObject
from bitwright.errors import NumericalFailure


def document(message: BaseModel) -> JsonObject:
    """The message as JSON has it.

    Raises:
        NumericalFailure: a number is not finite, which JSON cannot say; the detail names it.
    """
    data = message.model_dump(mode="json")
    for path, number in _numbers("", data):
        if not math.isfinite(number):
            hint = "check the checkpoint and its dtype; use more bits or a lower learning rate"
            detail = f"{path} is {number}, not a finite number"
            raise NumericalFailure(detail, field=path, value=str(number), hint=hint)
    return data


def _numbers(path: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{path}.{key}" if path else str(key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(f"{path}.{index}", item)
