"""Whole numbers as JSON knows them: 4.0 is one, whatever wrote it."""

from typing import Any


def with_whole_numbers(value: Any) -> Any:
    """The parsed JSON with every number that is whole as an `int`: JSON and its schemas do not tell 4.0 from 4."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {name: with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_whole_numbers(item) for item in value]
    return value
