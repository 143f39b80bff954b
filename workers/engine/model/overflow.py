"""Attribution of values that are not finite: to the quantized model, or to the original before quantization.

A model that was trained in bfloat16 and is run in float16 (largest value 65504) overflows by itself. What a stage then
finds not finite is no fault of its method, and no width mends it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitwright.errors import NumericalFailure

WIDER = (
    'set "dtype" to "bfloat16" (or "float32") in the model\'s config.json: every tensor is then read in it; upload the '
    "folder with that change where the model is not yours"
)
ALSO_DTYPE = "; a model in float16 may overflow by itself, and does not with bfloat16 in its config.json"
"""For hints of stages that cannot tell."""


def original_overflows(dtype: torch.dtype) -> NumericalFailure:
    """The error of a model whose own forward pass is not finite."""
    largest = f"; its largest value is {torch.finfo(dtype).max:g}" if dtype is torch.float16 else ""
    hint = WIDER if dtype is torch.float16 else "check the checkpoint: its weights are damaged, or of another model"
    name = str(dtype).removeprefix("torch.")
    return NumericalFailure(
        f"the original model's own outputs are not finite in {name}{largest}", field="model", value=name, hint=hint
    )


@contextmanager
def blaming_the_original(dtype: torch.dtype, states: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Tells of the original model if what was not finite in the block already was so in its `states`.

    Raises:
        NumericalFailure: as the block raised it, or in its place that the original model overflows.
    """
    try:
        yield
    except NumericalFailure as error:
        if all(_is_finite(each) for each in states()):
            raise
        raise original_overflows(dtype) from error


def weight_overflow(parameter: str, stored: Tensor, dtype: torch.dtype) -> NumericalFailure:
    """The error of a weight that is not finite in the model's dtype: it does not fit, or is so in the file."""
    name = str(dtype).removeprefix("torch.")
    detail, hint = f"{parameter} holds values that are not finite", "the file is damaged: fetch or send it again"
    if _is_finite(stored):
        kept = str(stored.dtype).removeprefix("torch.")
        detail = f"{parameter} is stored in {kept} and has values beyond {name}, the dtype that config.json names"
        hint = f'set "dtype" to "{kept}" in the model\'s config.json'
    return NumericalFailure(f"{detail} in {name}", field="model", value=parameter, hint=hint)


def _is_finite(states: Tensor) -> bool:
    """A few sequences at a time, since the mask of all of them would be half as large as they are."""
    rows = max(1, (1 << 24) // max(1, states[:1].numel()))
    return all(bool(part.isfinite().all()) for part in torch.split(states, rows))
