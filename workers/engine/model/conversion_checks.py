"""Checks that stored tensors and a model's parameters become each other: each runs without memory both ways."""

from collections.abc import Collection
from dataclasses import replace

import torch
from transformers.core_model_loading import dot_natural_key

from bitwright.errors import UnsupportedArchitecture
from workers.engine.model.checkpoint import FLOAT_DTYPES, Checkpoint
from workers.engine.model.conversions import Conversion, Grouping, Skeletal
from workers.engine.model.foreign_tensors import misfit


def fitted_conversions(
    groups: Grouping, checkpoint: Checkpoint, buffers: Collection[str]
) -> tuple[list[Conversion], list[Conversion]]:
    """Conversions that are right both ways, and those that lack stored tensors or have too many.

    Raises:
        CorruptCheckpoint: a shape or a dtype is not the model's.
        UnsupportedArchitecture: transformers does not give the names back.
    """
    fitted: list[Conversion] = []
    broken: list[Conversion] = []
    for conversion in groups.conversions:
        expected = expected_names(conversion, groups.model)
        given = _given(conversion.names, expected)
        if given is None:
            broken.append(conversion)
            continue
        fits = replace(conversion, given={back: name for back, name in given.items() if back != name})
        for back, name in given.items():
            _demand_fit(fits, checkpoint, name, expected[back], buffers)
        _demand_both_ways(fits, checkpoint, groups.model)
        fitted.append(fits)
    return fitted, broken


def expected_names(conversion: Conversion, model: Skeletal) -> dict[str, tuple[int, ...]]:
    """The stored names that transformers gives the parameters back under, and their shapes."""
    state = {name: model.state[name] for name in conversion.parameters}
    return {name: tuple(tensor.shape) for name, tensor in conversion.back(state, {}, model).items()}


def _given(stored: Collection[str], expected: Collection[str]) -> dict[str, str] | None:
    """Name that comes back -> the stored one, where they are the same but for a prefix; else None."""
    pairs = zip(sorted(expected, key=dot_natural_key), sorted(stored, key=dot_natural_key), strict=False)
    same = {back: name for back, name in pairs if back.endswith(name) or name.endswith(back)}
    return same if len(same) == len(stored) == len(expected) else None


def _demand_fit(
    conversion: Conversion, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], buffers: Collection[str]
) -> None:
    tensor, target = checkpoint.tensors[name], conversion.parameters[0]
    turned = conversion.converter is not None and tensor.shape[:-2] + tensor.shape[:-3:-1] == shape
    is_number = tensor.dtype in FLOAT_DTYPES or target in buffers
    if not is_number or not (tensor.shape == shape or turned):
        raise misfit(name, tensor.dtype, tensor.shape, shape, target)


def _demand_both_ways(conversion: Conversion, checkpoint: Checkpoint, model: Skeletal) -> None:
    """Runs a conversion on tensors without memory.

    Raises:
        UnsupportedArchitecture: it does not give the model's shapes, or not those of the file back.
    """
    if conversion.converter is None:
        return
    shapes = {name: checkpoint.tensors[name].shape for name in conversion.names}
    made = conversion.values(lambda name: torch.empty(shapes[name], device="meta"), model)
    back = conversion.back(made, shapes, model)
    wrong = [name for name in conversion.parameters if name not in made or made[name].shape != model.state[name].shape]
    wrong += [name for name in shapes if name not in back or tuple(back[name].shape) != shapes[name]]
    if wrong:
        hint = "choose a checkpoint of this model that transformers saved"
        detail = f"transformers does not convert {wrong[0]} both ways between the file and the model"
        raise UnsupportedArchitecture(detail, field="model", value=wrong[0], hint=hint)
