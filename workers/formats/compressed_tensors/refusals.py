"""Weights that the format cannot hold as they are, and numbers in it that no runtime reads as they are meant."""

from typing import NoReturn

import torch

from app.domain.methods.named_schemes import Element, ScaleType
from bitwright.errors import FormatCannotHold
from workers.numerics.quantized import AffineWeight, FloatWeight, LinearResult

E4M3_NAN = 0x7F
E8M0_NAN = 0xFF


def held(name: str, result: LinearResult) -> AffineWeight | FloatWeight:
    """The weight of the linear `name`, if it is one that the format holds.

    Raises:
        FormatCannotHold: it is none.
    """
    weight = result.weight
    whole = isinstance(weight, FloatWeight) or (isinstance(weight, AffineWeight) and weight.offset is None)
    if not whole or result.low_rank is not None or not isinstance(weight, AffineWeight | FloatWeight):
        raise FormatCannotHold(
            "compressed-tensors holds affine weights with whole zero points, without low-rank factors",
            field=name,
            hint='ask for formats: ["merged"], or add "peft" for the low-rank factors',
        )
    if weight.scale.dtype.itemsize > 1 and weight.scale.dtype != weight.dtype:
        raise FormatCannotHold(
            f"compressed-tensors stores scales as {weight.dtype}; these are {weight.scale.dtype}, and rounding them "
            "would change the weights",
            field=name,
            value=str(weight.scale.dtype),
            hint="quantize again with this format among the job's formats",
        )
    if not weight.scheme.divides(weight.shape[1]):
        _refuse(name, f"groups of {weight.scheme.group_size} do not divide its {weight.shape[1]} inputs")
    if isinstance(weight, FloatWeight):
        _check_numbers(name, weight)
    return weight


def in_common(result: LinearResult) -> dict[str, float]:
    """Numbers that vLLM takes from one of the linears that it runs as one, for all of them, without scaling the rest.

    Read in vLLM 0.33 (`compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py`): the largest divisor, so that the
    weights of the others come out too small.
    """
    weight = result.weight
    if not isinstance(weight, FloatWeight) or weight.global_scale is None:
        return {}
    amax = weight.input_amax
    inputs = {} if amax is None else {"largest magnitude of the inputs": float(amax)}
    return {"global scale": float(weight.global_scale), **inputs}


def _check_numbers(name: str, weight: FloatWeight) -> None:
    """Runtimes take block scales for unsigned, and none of them looks for NaN.

    Raises:
        FormatCannotHold: a scale that is zero, negative, NaN or infinite, a code that is NaN, or a number of the
            inputs that is missing.
    """
    row = weight.scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    if row.scale is ScaleType.FLOAT:
        _demand_positive(name, "a scale", weight.scale)
    else:
        # As bytes: of e4m3 0x00 is zero, 0x7F NaN and what is above negative; of e8m0 0xFF is NaN.
        stored = weight.scale.view(torch.uint8)
        least, beyond = (1, E4M3_NAN) if row.scale is ScaleType.E4M3 else (0, E8M0_NAN)
        wrong = (stored < least) | (stored >= beyond)
        if wrong.any():
            value = weight.scale.float()[wrong][0] if row.scale is ScaleType.E4M3 else torch.tensor(torch.nan)
            _refuse(name, f"a stored scale is {float(value):g}; runtimes read scales as positive numbers")
    if row.element is Element.E4M3 and ((weight.codes & E4M3_NAN) == E4M3_NAN).any():
        _refuse(name, "a code is NaN")
    if row.scale is ScaleType.E4M3:
        _demand_positive(name, "the global scale", weight.global_scale)
    if row.calibrated:
        _demand_positive(name, "the largest magnitude of its inputs", weight.input_amax)


def _demand_positive(name: str, what: str, numbers: torch.Tensor | None) -> None:
    if numbers is None:
        _refuse(name, f"{what} is missing")
    wrong = ~((numbers > 0) & torch.isfinite(numbers))
    if wrong.any():
        _refuse(name, f"{what} is {float(numbers[wrong][0]):g}, which is no positive number")


def _refuse(name: str, reason: str) -> NoReturn:
    raise FormatCannotHold(
        f"compressed-tensors cannot hold {name}: {reason}",
        field=name,
        hint="make the job again; if it ends the same way, leave this linear out by modules.ignore and report it",
    )
